"""Generating for many rows: an input in shards, a worker for each, every row written once."""
