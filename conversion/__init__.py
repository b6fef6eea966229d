"""Conversion of published checkpoints to the models of this package."""
