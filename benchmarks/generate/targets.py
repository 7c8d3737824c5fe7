"""Targets of whole calls of `generate`, and the names of the peers they are held against."""

from __future__ import annotations

from benchmarks.harness.targets import FASTEST, Target

OPERATION = "generate"

EAGER_FP32 = "PyTorch fp32"
AUTOCAST = "PyTorch bf16 autocast"
COMPILED = "torch.compile fp32"
COMPILED_GRAPHS = "torch.compile max-autotune bf16"
ONNX_RUNTIME = "ONNX Runtime fp32"
ONNX_RUNTIME_INT8 = "ONNX Runtime dynamic int8"
OPENVINO = "OpenVINO fp32"


def whole(backend: str, precision: str) -> str:
    """The name of our whole call."""
    return f"dlmone_fast {backend} {precision}"


def network(name: str) -> str:
    """The name of an implementation's network alone."""
    return f"{name}, network"


LOWER_PRECISIONS = ("bf16", "fp16", "int8")


def precision_of(name: str) -> str:
    """The precision that an implementation's name states; "fp32" where it states none."""
    return next((found for found in LOWER_PRECISIONS if found in name.split()), "fp32")


_ONE, _MOST = "BERT-base, batch 1", "BERT-base, batch 512"
_INT8, _GRAPH = whole("openvino", "int8"), whole("graph", "bf16")
_BF16, _FP32 = whole("openvino", "bf16"), whole("openvino", "fp32")

TARGETS = (
    Target("cpu", OPERATION, _ONE, "time", 1 / 4.2, EAGER_FP32, own=_BF16),
    Target("cpu", OPERATION, _ONE, "time", 1 / 7, EAGER_FP32, own=_INT8),
    Target("cpu", OPERATION, _ONE, "time", 1.1, network(OPENVINO), own=_FP32),
    Target("cpu", OPERATION, _ONE, "time", 1.1, network(_INT8), own=_INT8),
    Target("cpu", OPERATION, "compact, batch 1", "milliseconds", 4, own=FASTEST),
    Target("cuda", OPERATION, _ONE, "milliseconds", 0.24, own=_GRAPH),
    Target("cuda", OPERATION, _ONE, "time", 1 / 2, COMPILED_GRAPHS, own=_GRAPH),
    Target("cuda", OPERATION, _MOST, "sequences", 24_000, own=_GRAPH, batch=512),
    Target("cuda", OPERATION, _MOST, "time", 1 / 1.2, COMPILED_GRAPHS, own=_GRAPH),
    Target("cuda", OPERATION, _MOST, "memory", 1 / 8, EAGER_FP32, own=_GRAPH),
)
