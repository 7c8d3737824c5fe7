"""Tools for Triton kernels: where they can run, and the check that they compile for a GPU.

The kernels themselves are in `kernels/<operation>/triton.py`. Those modules import triton, so an
operation imports its own only when it runs on this backend.
"""
