"""What never runs in training: official downloads, the audit, splits, the toy set."""
