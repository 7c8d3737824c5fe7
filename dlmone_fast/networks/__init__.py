"""The networks: one backbone f(x_t, t) for teacher φ, generator θ and score estimator ψ."""

from dlmone_fast.networks.backbone import Backbone
from dlmone_fast.networks.diffusion_lm import DiffusionLM
from dlmone_fast.networks.embedding import TokenEmbedding
from dlmone_fast.networks.score_estimator import ScoreEstimator

__all__ = ["Backbone", "DiffusionLM", "ScoreEstimator", "TokenEmbedding"]
