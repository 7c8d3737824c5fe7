"""Whole calls around the same network, run by other libraries.

Every peer has the same weights, the same tokenizer and layout of prompts, and one plain way around
its network: `torch.randn`, a product with the whole table, arg-min. `PEERS` describes each; a
library that cannot be imported is named with the reason.
"""

from __future__ import annotations

import functools
import importlib.util
import tempfile
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.generate import targets as names
from benchmarks.generate.cases import TUNED_BATCHES, Model
from benchmarks.kernels.peers import expression_argmin, matmul_argmin
from dlmone_fast.data.batches import source_batch
from dlmone_fast.runtime.engines.openvino_model import without_telemetry

Network = Callable[[Tensor, Tensor], Tensor]
"""x_t [B, L, d] and network time [B] → x̂0 [B, L, d], all fp32."""

Rounding = Callable[[Tensor, Tensor, Tensor], Tensor]

Exported = Callable[[], Path]
"""The file of the network as ONNX, written at the first call."""

NO_BF16 = "no bf16 on this CPU"
_OPSET = 17


@dataclass(frozen=True)
class Output:
    """Texts, and the ids of each prompt's target positions."""

    texts: list[str]
    token_ids: list[list[int]]


@dataclass(eq=False)
class Peer:
    """A network that another library runs, made at its first call.

    Attributes:
        name: as in the report.
        make: makes the network.
        absent: why it cannot run here; "": it can.
        rounding: how ids are found from outputs.
        dtype: of the rounding's product; its norms stay fp32.
        batches: the sizes that it is timed at; empty: all.
    """

    name: str
    make: Callable[[], Network]
    absent: str = ""
    rounding: Rounding = matmul_argmin
    dtype: torch.dtype = torch.float32
    batches: tuple[int, ...] = ()

    @functools.cached_property
    def network(self) -> Network:
        return self.make()


class PlainCall:
    """Text in, text out, as one writes it around a network."""

    def __init__(self, model: Model, peer: Peer) -> None:
        self.model = model
        self.peer = peer
        self._norms = model.vocabulary.table.square().sum(1)
        self._rounding_table = model.vocabulary.table.to(peer.dtype)

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], noise: Tensor | None = None) -> Output:
        """The answers; with `noise` [B, L, d] instead of torch's own."""
        model, table = self.model, self.model.vocabulary.table
        tokenizer, schedule, device = model.tokenizer, model.denoiser.schedule, table.device
        sizes = model.denoiser.config
        ids, mask, _ = source_batch(
            tokenizer.encode(prompts), sizes.seq_len, tokenizer, model.settings.max_source_tokens,
            "truncate", sizes.source_positions,
        )  # fmt: skip
        ids, target = ids.to(device), mask.to(device) != 0
        source, t = table[ids], model.settings.t_init
        noise = torch.randn(source.shape, device=device) if noise is None else noise
        sigma = float(1 - schedule.alphas_cumprod[t]) ** 0.5
        x_t = torch.where(target[..., None], sigma * noise, source)
        time = schedule.network_time(torch.full((len(ids),), t, device=device))
        x0 = self.peer.network(x_t, time).flatten(0, 1).to(self.peer.dtype)
        found = self.peer.rounding(x0, self._rounding_table, self._norms).view_as(ids).cpu()
        targets = [row[kept != 0].tolist() for row, kept in zip(found, mask, strict=True)]
        return Output([tokenizer.decode_clean(row) for row in targets], targets)


def compiled_argmin(x: Tensor, table: Tensor, norms: Tensor) -> Tensor:
    """`expression_argmin` by torch.compile, which fuses it."""
    return _compiled_argmin()(x, table, norms)


@functools.cache
def _compiled_argmin() -> Rounding:
    # At its first use: torch.compile takes a second to import.
    found: Rounding = torch.compile(expression_argmin, dynamic=False)
    return found


def missing(*packages: str) -> str:
    """The packages that cannot be imported, as a reason; "": all can."""
    found = [package for package in packages if importlib.util.find_spec(package) is None]
    return f"{' and '.join(found)} not installed" if found else ""


def why_absent(device: torch.device, dtype: torch.dtype, packages: Sequence[str]) -> str:
    """The reason why packages or `dtype` keep an implementation from running; "": none does."""
    if dtype == torch.bfloat16 and device.type == "cpu" and not cpu_has_bf16():
        return NO_BF16
    return missing(*packages)


def cpu_has_bf16() -> bool:
    """True if the CPU multiplies in bf16 itself; otherwise a library only imitates it."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return False
    flags = next((x for x in lines if x.startswith(("flags", "Features"))), "").split()
    return bool({"avx512_bf16", "amx_bf16", "bf16"} & set(flags))


class _Bare(nn.Module):
    """The network alone, of two floating-point tensors."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.lm = model.denoiser.lm

    def forward(self, x_t: Tensor, time: Tensor) -> Tensor:
        result: Tensor = self.lm(x_t, time)
        return result


def _eager(model: Model) -> Network:
    return _Bare(model).eval()


def _autocast(model: Model) -> Network:
    device, network = model.device.type, _Bare(model).eval()

    def run(x_t: Tensor, time: Tensor) -> Tensor:
        with torch.autocast(device, torch.bfloat16):
            return network(x_t, time)

    return run


def _compiled(network: Network, mode: str = "default") -> Network:
    found: Network = torch.compile(network, dynamic=False, mode=mode)
    return found


def _export(model: Model, folder: Path) -> Path:
    # A folder of its own: a library may still read the file of the model before.
    config, path = model.denoiser.config, Path(tempfile.mkdtemp(dir=folder)) / "network.onnx"
    example = (torch.zeros(2, config.seq_len, config.embedding_dim), torch.zeros(2))
    with warnings.catch_warnings():
        # This exporter is deprecated, but needs no package beyond onnx.
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            _Bare(model).eval(), example, str(path), dynamo=False, opset_version=_OPSET,
            input_names=["x_t", "time"], output_names=["x0"],
            dynamic_axes={name: {0: "batch"} for name in ("x_t", "time", "x0")},
        )  # fmt: skip
    return path


def _in_int8(path: Path) -> Path:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    target = path.with_suffix(".int8.onnx")
    quantize_dynamic(path, target, weight_type=QuantType.QInt8)
    return target


def _onnx_runtime(path: Path) -> Network:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(x_t: Tensor, time: Tensor) -> Tensor:
        given = {"x_t": x_t.numpy(), "time": time.numpy()}
        return torch.from_numpy(session.run(None, given)[0])

    return run


def _openvino(path: Path) -> Network:
    with without_telemetry():
        import openvino

    settings: dict[str, Any] = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "INFERENCE_PRECISION_HINT": "f32",
    }
    request = openvino.Core().compile_model(path, "CPU", settings).create_infer_request()

    def run(x_t: Tensor, time: Tensor) -> Tensor:
        found = request.infer([x_t.numpy(), time.numpy()], share_inputs=True, share_outputs=True)
        return torch.from_numpy(found[0])

    return run


@dataclass(frozen=True)
class Entry:
    """One library's way to run a model's network.

    Attributes:
        make: the network of a model and of its exported file.
        packages: what must be importable besides torch.
        rounding: how ids are found from outputs.
        dtype: of the rounding's product; its norms stay fp32.
        batches: the sizes that it is timed at; empty: all.
    """

    make: Callable[[Model, Exported], Network]
    packages: tuple[str, ...] = ()
    rounding: Rounding = matmul_argmin
    dtype: torch.dtype = torch.float32
    batches: tuple[int, ...] = ()


_BF16 = torch.bfloat16
_ONNX = ("onnx", "onnxruntime")

PEERS: dict[str, dict[str, Entry]] = {
    "cpu": {
        names.EAGER_FP32: Entry(lambda model, _: _eager(model)),
        names.AUTOCAST: Entry(
            lambda model, _: _autocast(model), rounding=expression_argmin, dtype=_BF16
        ),
        names.COMPILED: Entry(lambda model, _: _compiled(_eager(model)), rounding=compiled_argmin),
        names.ONNX_RUNTIME: Entry(lambda _, exported: _onnx_runtime(exported()), _ONNX),
        names.ONNX_RUNTIME_INT8: Entry(
            lambda _, exported: _onnx_runtime(_in_int8(exported())), _ONNX
        ),
        names.OPENVINO: Entry(lambda _, exported: _openvino(exported()), ("onnx", "openvino")),
    },
    "cuda": {
        names.EAGER_FP32: Entry(lambda model, _: _eager(model)),
        names.AUTOCAST: Entry(
            lambda model, _: _autocast(model), rounding=expression_argmin, dtype=_BF16
        ),
        names.COMPILED_GRAPHS: Entry(
            lambda model, _: _compiled(_autocast(model), "max-autotune"),
            rounding=compiled_argmin,
            dtype=_BF16,
            batches=TUNED_BATCHES,
        ),
    },
}
"""Libraries that are timed around the same network, by device and by name in the report."""


def peers(model: Model, folder: Path) -> list[Peer]:
    """The peers on the model's device; `folder` is for exported files."""
    exported = functools.cache(lambda: _export(model, folder))
    return [
        Peer(
            name, functools.partial(entry.make, model, exported),
            why_absent(model.device, entry.dtype, entry.packages),
            entry.rounding, entry.dtype, entry.batches,
        )
        for name, entry in PEERS[model.device.type].items()
    ]  # fmt: skip
