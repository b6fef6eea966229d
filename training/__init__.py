"""Training: arguments, data order, objectives, the loop, checkpoints, evaluation and tracking during a run."""
