"""Reference figures of the authors' release, and the formulas of the inputs they were computed on."""
