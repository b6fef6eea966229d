"""Ways to draw pictures: one file a pipeline, complete in itself."""
