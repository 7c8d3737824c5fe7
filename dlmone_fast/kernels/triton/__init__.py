"""Triton kernels and the functions that launch them.

Modules here import triton, so an operation imports its own only when it runs on this backend.
"""
