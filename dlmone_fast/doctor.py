"""The command `python -m dlmone_fast.doctor`: what is installed, what it runs on, does it work."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dlmone_fast
from dlmone_fast.cli import OptionalStr, parse, run_command
from dlmone_fast.errors import EXIT_MODEL, EXIT_OK, DlmOneError

if TYPE_CHECKING:
    from dlmone_fast.models.denoiser import Denoiser
    from dlmone_fast.tokenizer import Tokenizer

DESCRIPTION = """Show versions, devices, kernel backends and models, and run a short self-test.

The self-test generates one batch on every usable backend but compile (which takes half a minute)
with a tiny random model, and compares two operations with known answers. Exit codes: 0 it passed,
4 it failed, torch is missing, or the model folder of --model cannot be used; 2 usage.
"""

PACKAGES = (
    "torch",
    "numpy",
    "triton",
    "tokenizers",
    "safetensors",
    "sacrebleu",
    "tyro",
    "openvino",
    "nncf",
)


@dataclass(frozen=True)
class DoctorArgs:
    """Options of the command."""

    json: bool = False
    """Print one JSON object."""
    model: OptionalStr = None
    """Also load this model folder and generate with it."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    args = parse(
        DoctorArgs, prog="python -m dlmone_fast.doctor", description=DESCRIPTION, args=argv
    )
    report = examine(args.model)
    print(json.dumps(report, indent=2) if args.json else format_report(report))
    return EXIT_OK if report["ok"] else EXIT_MODEL


def examine(model: str | None = None) -> dict[str, Any]:
    """Everything the command shows; `ok` says whether all checks passed."""
    report: dict[str, Any] = {"versions": versions()}
    try:
        import torch
    except (ImportError, OSError) as error:
        report["torch"] = f"cannot be imported ({error}); install it: pip install 'torch>=2.10'"
        return {**report, "ok": False}
    report["threads"] = torch.get_num_threads()
    report["devices"] = _devices()
    report["native"] = _native()
    report["kernels"] = _kernels()
    report["precision"] = _precision()
    report["generation"] = _generation()
    report["default_model"] = _default_model()
    checks = {
        "philox known answer": _check_noise,
        "nearest token agrees with the reference": _check_nearest_token,
    }
    for backend, why in report["generation"].items():
        if why != "usable" or backend == "compile":
            continue
        checks[f"a tiny model generates on {backend}"] = partial(_check_generation, backend)
    report["self_test"] = {name: _outcome(check) for name, check in checks.items()}
    if model is not None:
        report["self_test"][f"model {model}"] = _outcome(lambda: _check_model(model))
    return {**report, "ok": all(result == "ok" for result in report["self_test"].values())}


def versions() -> dict[str, str]:
    """Versions of Python, this package and what it builds on, without importing them."""
    found = {"python": platform.python_version(), "dlmone_fast": dlmone_fast.__version__}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def format_report(report: dict[str, Any]) -> str:
    """The report as lines of text."""
    lines = [f"{name:<14}{version}" for name, version in report["versions"].items()]
    if "torch" in report:
        return "\n".join([*lines, "", f"torch {report['torch']}"])
    native, default = report["native"], report["default_model"]
    lines += ["", f"{'threads':<14}{report['threads']}"]
    lines += [f"{'device':<14}{device}" for device in report["devices"]]
    lines.append(f"{'native':<14}{native['extension']}")
    lines.append(f"{'CPU paths':<14}{', '.join(native['cpu_paths']) or 'none'}")
    lines.append(f"{'CUDA':<14}{native['cuda']}")
    for op, backends in report["kernels"].items():
        lines.append(f"{op}: " + "; ".join(f"{b}: {why}" for b, why in backends.items()))
    generation = "; ".join(f"{b}: {why}" for b, why in report["generation"].items())
    lines.append(f"generate(): {generation}")
    for use, choice in report["precision"].items():
        lines.append(f"precision auto, {use}: {choice}")
    lines += [f"{'model':<14}{default}", ""]
    lines += [f"{name}: {result}" for name, result in report["self_test"].items()]
    return "\n".join([*lines, "self-test passed" if report["ok"] else "self-test FAILED"])


def _devices() -> list[str]:
    import torch

    machine = platform.processor() or platform.machine()
    found = [f"cpu: {machine}, {torch.backends.cpu.get_cpu_capability()}"]
    if not torch.cuda.is_available():
        why = "torch sees no GPU" if torch.version.cuda else "this torch is built without CUDA"
        return [*found, f"cuda: none ({why})"]
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        found.append(
            f"cuda:{index}: {properties.name}, compute capability {properties.major}."
            f"{properties.minor}, {memory:.1f} GiB"
        )
    return found


def _native() -> dict[str, Any]:
    from dlmone_fast.kernels import native

    return {
        "extension": "available" if native.is_available() else f"missing: {native.why_missing()}",
        "cpu_paths": list(native.cpu_paths()),
        "cuda": native.cuda_report(),
    }


def _kernels() -> dict[str, dict[str, str]]:
    """Backends of each operation with "usable" or why not, on each kind of device there is."""
    import torch

    from dlmone_fast.kernels import dispatch

    devices = ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]
    # Importing an operation registers its backends.
    for name in dispatch.OPERATIONS:
        importlib.import_module(f"dlmone_fast.kernels.{name}")
    found: dict[str, dict[str, str]] = {}
    for device in devices:
        example = (torch.zeros(1, 4, device=device), torch.zeros(2, 4, device=device))
        for op in dispatch.operations():
            found[f"{op} on {device}"] = {
                backend.name: backend.usable(*example) or "usable"
                for backend in dispatch.backends(op)
            }
    return found


def _precision() -> dict[str, str]:
    from dlmone_fast.runtime.loading import pick_device, pick_precision
    from dlmone_fast.training.workspace import multiplies_bf16

    device = pick_device("auto")
    return {
        "generation": f"{pick_precision('auto', device)} on {device}",
        "training": f"{'bf16' if multiplies_bf16(device) else 'fp32'} on {device}",
    }


def _default_model() -> str:
    from dlmone_fast.runtime.default import ENVIRONMENT_VARIABLE, default_folder

    folder = default_folder()
    if folder is None:
        return f"none: {ENVIRONMENT_VARIABLE} is not set"
    return f"{folder}" if os.path.isfile(Path(folder, "manifest.json")) else f"{folder}: not there"


def _outcome(check: Any) -> str:
    # A doctor reports whatever breaks, with its class, instead of breaking.
    try:
        check()
    except DlmOneError as error:
        return f"failed: {error}"
    except Exception as error:
        return f"failed: {type(error).__name__}: {error}"
    return "ok"


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise RuntimeError(what)


def _check_noise() -> None:
    """The zero-key, zero-counter vector of Random123's known answers (Salmon et al., 2011)."""
    import torch

    from dlmone_fast.kernels.noise import philox_4x32

    words = philox_4x32((0, 0), torch.zeros(4, dtype=torch.int64)).tolist()
    known = [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    _require(words == known, f"got {[f'{word:08x}' for word in words]}")


def _check_nearest_token() -> None:
    import torch

    from dlmone_fast.kernels.nearest_token import nearest_token, reference

    numbers = torch.Generator().manual_seed(0)
    x, table = (torch.randn(n, 48, generator=numbers) for n in (40, 300))
    _require(bool((nearest_token(x, table) == reference.nearest_token(x, table)).all()), "differs")


def _generation() -> dict[str, str]:
    """What "auto" takes for `generate` here, and each backend's "usable" or why not."""
    from dlmone_fast.runtime.engines import EngineRequest, survey
    from dlmone_fast.runtime.loading import pick_precision

    denoiser, _ = _tiny_model()
    precision = pick_precision("auto", denoiser.embedding.device)
    return survey(EngineRequest(denoiser, precision))


def _tiny_model() -> tuple[Denoiser, Tokenizer]:
    import torch

    from dlmone_fast.config import DiffusionConfig, ModelConfig
    from dlmone_fast.diffusion import Schedule
    from dlmone_fast.models.denoiser import Denoiser
    from dlmone_fast.models.devices import pick_device
    from dlmone_fast.networks import DiffusionLM
    from dlmone_fast.tokenizer import Tokenizer

    tokenizer = Tokenizer.from_words(["one", "two", "three", "four"])
    model = ModelConfig(
        seq_len=16,
        vocab_size=tokenizer.vocab_size,
        embedding_dim=8,
        time_dim=8,
        hidden_size=16,
        num_layers=2,
        num_heads=2,
        ffn_size=32,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        lm = DiffusionLM(model)
    denoiser = Denoiser(lm, Schedule(DiffusionConfig())).eval().requires_grad_(False)
    return denoiser.to(pick_device("auto")), tokenizer


def _check_generation(backend: str) -> None:
    from dlmone_fast.runtime.generator import Generator
    from dlmone_fast.runtime.loading import pick_precision
    from dlmone_fast.runtime.options import GenerationSettings

    denoiser, tokenizer = _tiny_model()
    settings = GenerationSettings(max_source_tokens=8)
    precision = pick_precision("auto", denoiser.embedding.device)
    generator = Generator(denoiser, tokenizer, settings, precision, backend=backend)
    prompts = ["one two", "three", "four four one"]
    first, again = (generator.generate(prompts, seed=1, return_dict=True) for _ in range(2))
    _require(first.token_ids == again.token_ids, "the same seed gave two different answers")
    _require(
        all(0 <= token < tokenizer.vocab_size for ids in first.token_ids for token in ids),
        "an id lies outside the vocabulary",
    )
    if generator.precision == "fp32":
        plain = Generator(denoiser, tokenizer, settings, "fp32")
        expected = plain.generate(prompts, seed=1, return_dict=True)
        _require(first.token_ids == expected.token_ids, "differs from plain PyTorch")


def _check_model(path: str) -> None:
    from dlmone_fast.runtime import load_model

    generator = load_model(path)
    generator.generate(["one"], on_overflow="truncate", progress=False)


if __name__ == "__main__":
    run_command(main)
