"""Samplers of the teacher: many network calls, from noise to embeddings."""

from dlmone_fast.samplers.grids import METHODS, timestep_grid
from dlmone_fast.samplers.loop import sample

__all__ = ["METHODS", "sample", "timestep_grid"]
