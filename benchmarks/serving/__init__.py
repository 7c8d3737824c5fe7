"""Load tests of the server: `python -m benchmarks.serving`."""
