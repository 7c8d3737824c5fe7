"""Forward diffusion of target positions, from x_0 or from token ids."""

from dlmone_fast.kernels.forward_diffusion.op import (
    diffuse_of_draws,
    forward_diffusion,
    forward_diffusion_of_tokens,
)

__all__ = ["diffuse_of_draws", "forward_diffusion", "forward_diffusion_of_tokens"]
