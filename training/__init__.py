"""All that the training scripts share: arguments, data, the loop, objectives, checkpoints, tracking."""
