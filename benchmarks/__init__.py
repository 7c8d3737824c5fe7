"""Measurements of the repository, which are not part of what is installed.

Modules at this level are commands (`python -m benchmarks.frontier`, and so on); `paper`, `report`
and `serving` are commands too. Folders hold what commands and `pytest benchmarks --benchmark-only`
use. They import one way: harness, kernels, generate, training and serving, quality, report, paper.
"""
