"""Training: the teacher, the two stages of distillation, and what they share."""

from dlmone_fast.training.pipeline import (
    RunResult,
    distill,
    run,
    teacher_tokenizer,
    train_teacher,
    with_teacher,
)

__all__ = [
    "RunResult", "distill", "run", "teacher_tokenizer", "train_teacher", "with_teacher",
]  # fmt: skip
