"""Forward diffusion: noise schedules, q(x_t | x_0) and the draws of t."""

from dlmone_fast.diffusion.decodability import critical_log_snr, timestep_at
from dlmone_fast.diffusion.schedule import Draw, Schedule, column
from dlmone_fast.diffusion.timesteps import LossAwareTimesteps, TimestepSampler, UniformTimesteps

__all__ = [
    "Draw",
    "LossAwareTimesteps",
    "Schedule",
    "TimestepSampler",
    "UniformTimesteps",
    "column",
    "critical_log_snr",
    "timestep_at",
]
