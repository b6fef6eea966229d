"""Noise processes: one file a scheduler, complete in itself."""
