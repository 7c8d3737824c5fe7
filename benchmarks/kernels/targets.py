"""The kernels' targets, and the names of the peers that they are held against."""

from __future__ import annotations

from benchmarks.harness.race import COMPILED, EAGER
from benchmarks.harness.targets import Target

MATMUL_ARGMIN = "matmul + argmin"
COMPILED_ARGMIN = "matmul + argmin, compiled"
COMPILED_ARGMIN_BF16 = "matmul + argmin, bf16, compiled"
ALL_DIFFERENCES = "DiffuSeq get_knn"
EXPANDED_SQUARE = "DiffuSeq get_efficient_knn"
FLASH_KMEANS = "flash-kmeans"

TARGETS = (
    Target("cpu", "rounding", "128 tokens float32", "time", 0.42, MATMUL_ARGMIN),
    Target("cpu", "rounding", "1024 tokens float32", "time", 0.22, MATMUL_ARGMIN),
    Target("cpu", "rounding", "128 tokens float32", "memory", 1 / 100, ALL_DIFFERENCES),
    Target("cpu", "noise", "1×128×128 float32", "milliseconds", 0.1),
    Target("cuda", "forward diffusion", "8192×128×128 float32", "time", 1 / 5, EAGER),
    Target("cuda", "forward diffusion", "8192×128×128 float32", "bandwidth", 0.85),
    Target("cuda", "forward diffusion", "8192×128×128 bfloat16", "time", 1 / 5, EAGER),
    Target("cuda", "forward diffusion", "8192×128×128 bfloat16", "bandwidth", 0.85),
    Target("cuda", "distillation loss", "4096×128×128 float32", "time", 1 / 4, EAGER),
    Target("cuda", "distillation loss", "4096×128×128 float32", "time", 1 / 1.6, COMPILED),
    Target("cuda", "distillation loss", "8192×128×128 bfloat16", "time", 1 / 4, EAGER),
    Target("cuda", "distillation loss", "8192×128×128 bfloat16", "time", 1 / 1.6, COMPILED),
    Target("cuda", "rounding", "16384 tokens float32", "time", 1 / 4, COMPILED_ARGMIN_BF16),
    Target("cuda", "rounding", "16384 tokens float32", "time", 1 / 1.2, FLASH_KMEANS),
    Target("cuda", "rounding", "16384 tokens float32", "time", 1 / 20, EXPANDED_SQUARE),
    Target("cuda", "rounding", "16384 tokens float32", "memory", 1 / 1000, MATMUL_ARGMIN),
    Target("cuda", "linear cross-entropy", "8192 tokens float32", "memory", 1 / 14, EAGER),
    Target("cuda", "linear cross-entropy", "8192 tokens bfloat16", "memory", 1 / 14, EAGER),
)
