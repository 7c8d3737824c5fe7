"""Configuration: what can be set, what is preset, and how the layers are merged."""

from dlmone_fast.config.distillation import DistillConfig, StageConfig
from dlmone_fast.config.layering import (
    from_dict,
    layered,
    load_toml,
    merge,
    resolve,
    to_dict,
    to_toml,
)
from dlmone_fast.config.presets import PRESETS
from dlmone_fast.config.schema import (
    Config,
    DataConfig,
    DiffusionConfig,
    EvaluationConfig,
    ModelConfig,
    TeacherConfig,
)
from dlmone_fast.config.section import unchecked

__all__ = [
    "PRESETS",
    "Config",
    "DataConfig",
    "DiffusionConfig",
    "DistillConfig",
    "EvaluationConfig",
    "ModelConfig",
    "StageConfig",
    "TeacherConfig",
    "from_dict",
    "layered",
    "load_toml",
    "merge",
    "resolve",
    "to_dict",
    "to_toml",
    "unchecked",
]
