"""A page that compares runs: what a save path holds, charts, pictures and published figures in one HTML file."""
