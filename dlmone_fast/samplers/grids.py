"""Which timesteps a sampler calls the network at. `steps` always means network calls (NFE)."""

from __future__ import annotations

from dlmone_fast.checks import is_whole
from dlmone_fast.errors import UsageError

METHODS = ("ancestral", "published-ddim", "ddim", "dpm-solver++", "q-sampling")
"""ancestral: DiffuSeq's full chain. published-ddim: its strided loop, exactly as published.
ddim, dpm-solver++, q-sampling: correct at any number of calls."""


def timestep_grid(method: str, steps: int, num_timesteps: int) -> list[int]:
    """The timesteps of `steps` network calls, from the noisiest down.

    Raises:
        UsageError: an unknown method, or a number of calls that the method cannot make; the
            message names the nearest possible ones.
    """
    if method not in METHODS:
        raise UsageError(f"sampler must be one of {', '.join(METHODS)}; got {method!r}")
    if not is_whole(steps, 1, num_timesteps):
        raise UsageError(f"steps must be between 1 and {num_timesteps}, got {steps!r}")
    last = num_timesteps - 1
    if method == "ancestral":
        if steps != num_timesteps:
            raise UsageError(
                f"the ancestral sampler makes {num_timesteps} network calls, got steps={steps}; "
                "use ddim, dpm-solver++ or q-sampling for fewer"
            )
        return list(range(last, -1, -1))
    if method == "published-ddim":
        return list(range(last, -1, -published_gap(steps, num_timesteps)))
    # Evenly spaced from the noisiest level down, the last call one spacing above clean data.
    return [round(num_timesteps * (1 - i / steps)) - 1 for i in range(steps)]


def published_gap(steps: int, num_timesteps: int) -> int:
    """The gap of DiffuSeq's strided loop that makes `steps` calls: ceil(T / gap) = steps."""
    # ceil(T / gap) falls as gap grows, so the smallest gap that reaches `steps` decides.
    gap = -(-num_timesteps // steps)
    calls = -(-num_timesteps // gap)
    if calls == steps:
        return gap
    more = -(-num_timesteps // (gap - 1))
    raise UsageError(
        f"the published strided sampler cannot make {steps} network calls: its gap is a whole "
        f"number; the nearest possible are {calls} and {more}"
    )
