"""Training objectives: one loss per sample."""
