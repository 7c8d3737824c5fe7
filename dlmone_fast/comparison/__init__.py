"""The table that ends a run: teacher, undistilled student and student, by quality and speed."""

from dlmone_fast.comparison.compare import compare_run

__all__ = ["compare_run"]
