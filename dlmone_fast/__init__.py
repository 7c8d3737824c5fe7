"""One-step text generation by distilled diffusion language models (DLM-One, arXiv 2506.00290).

Public names load on first use, so that `import dlmone_fast` costs milliseconds and needs no torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dlmone_fast.config import Config, resolve
    from dlmone_fast.evaluation.run import evaluate_model
    from dlmone_fast.models.denoiser import Denoiser, load_teacher
    from dlmone_fast.runtime import (
        GenerationOutput,
        Generator,
        from_pretrained,
        generate,
        load,
        unload,
    )
    from dlmone_fast.tasks.arpabet import to_ipa
    from dlmone_fast.training import distill, train_teacher

__version__ = "0.1.0"

_HOMES = {
    "Config": "dlmone_fast.config",
    "Denoiser": "dlmone_fast.models.denoiser",
    "GenerationOutput": "dlmone_fast.runtime",
    "Generator": "dlmone_fast.runtime",
    "distill": "dlmone_fast.training",
    "evaluate_model": "dlmone_fast.evaluation.run",
    "from_pretrained": "dlmone_fast.runtime",
    "generate": "dlmone_fast.runtime",
    "load": "dlmone_fast.runtime",
    "load_teacher": "dlmone_fast.models.denoiser",
    "resolve": "dlmone_fast.config",
    "to_ipa": "dlmone_fast.tasks.arpabet",
    "train_teacher": "dlmone_fast.training",
    "unload": "dlmone_fast.runtime",
}

__all__ = [
    "Config",
    "Denoiser",
    "GenerationOutput",
    "Generator",
    "__version__",
    "distill",
    "evaluate_model",
    "from_pretrained",
    "generate",
    "load",
    "load_teacher",
    "resolve",
    "to_ipa",
    "train_teacher",
    "unload",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module 'dlmone_fast' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
