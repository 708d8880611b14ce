"""Processes: launch, process group, DDP, BatchNorm, collectives, watchdog."""
