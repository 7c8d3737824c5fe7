"""Text in, text out: loaded models and the `generate` call."""

from dlmone_fast.runtime.default import from_pretrained, generate, load, unload
from dlmone_fast.runtime.generator import Generator
from dlmone_fast.runtime.loading import load_model
from dlmone_fast.runtime.options import GenerationOutput, GenerationSettings

__all__ = [
    "GenerationOutput",
    "GenerationSettings",
    "Generator",
    "from_pretrained",
    "generate",
    "load",
    "load_model",
    "unload",
]
