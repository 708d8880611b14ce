"""Benchmarks, and the naive reference implementations that they and the tests compare against."""
