"""Drawing pictures from a finished pipeline, and laying them out."""
