"""What the methods share: configuration, processes, training loop, losses, evaluation, checkpoints, logs."""
