"""Training objectives: the loss of each sample in a micro-batch."""
