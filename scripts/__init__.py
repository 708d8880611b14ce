"""What a person runs besides training: the shell launchers, and Python tools run as `python -m scripts.NAME`."""
