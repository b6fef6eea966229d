"""Noise processes, one self-contained file per scheduler."""
