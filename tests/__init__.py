"""The tests: mostly a file for each file of the project, and what they share: helpers, steps, faults, reference/."""
