"""Tests of what only a GPU can tell. Where a body needs none, it runs on the CPU too, so that it is known to work."""
