"""Pages and pictures from records: `python -m benchmarks.report`."""
