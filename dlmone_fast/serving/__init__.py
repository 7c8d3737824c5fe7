"""Answering over HTTP: LitServe's processes and queues, with this package's batches and limits."""
