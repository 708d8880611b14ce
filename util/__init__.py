"""What the methods share: configuration, processes, training engine, losses, evaluation, checkpoints, logs."""
