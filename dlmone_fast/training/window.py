"""The window of t in distillation."""

from __future__ import annotations

from dlmone_fast.config import Config
from dlmone_fast.diffusion import Schedule, critical_log_snr, timestep_at
from dlmone_fast.errors import ConfigError


def timestep_window(config: Config) -> tuple[int, int]:
    """[low, high) from which t is drawn for ψ and θ; the vocabulary's size must be known.

    With `distill.decodable_margin` the low end is where the log-SNR is that far above the critical
    one: with less noise every token decodes on its own, and scores say nothing of the sequence.

    Raises:
        ConfigError: nothing is left between the two.
    """
    c, model = config.distill, config.model
    low = c.t_min
    if c.decodable_margin:
        critical = critical_log_snr(model.embedding_dim, model.vocab_size, model.noise_scale)
        decodable = timestep_at(Schedule(config.diffusion), critical + c.decodable_margin)
        low = max(low, decodable)
    if low >= c.t_max:
        raise ConfigError(
            f"distill.decodable_margin = {c.decodable_margin:g} leaves no timestep: it starts at "
            f"{low} for this model, distill.t_max is {c.t_max}; raise either of them"
        )
    return low, c.t_max
