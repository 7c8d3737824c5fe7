"""Measurements: `pytest benchmarks/ --benchmark-only`, and runs over several seeds."""
