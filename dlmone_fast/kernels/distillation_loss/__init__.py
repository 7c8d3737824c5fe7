"""The distillation loss per sample: SiD or KL form, its weight and gradients in closed form."""

from dlmone_fast.kernels.distillation_loss.op import distillation_loss, weight_floor

__all__ = ["distillation_loss", "weight_floor"]
