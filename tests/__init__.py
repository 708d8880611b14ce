"""Tests: one file for each file of the project, with what they share in helpers.py and reference/."""
