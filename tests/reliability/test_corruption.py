"""Damaged model folders and checkpoints: each is refused by name, none loads.

Folders and checkpoints are those of a real run. Damage that the manifest must notice is done to
any of its files; what a manifest vouches for all the same (somebody sealed it again) must be
refused for what it holds.
"""

from __future__ import annotations

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from damage import DAMAGES, damage
from figures import Figure
from resealing import edit_json, edit_tensors
from torch import Tensor

from dlmone_fast.config import from_dict, load_toml, merge
from dlmone_fast.errors import CheckpointError, DlmOneError, ModelFileError
from dlmone_fast.models.checkpoint import list_checkpoints, load_checkpoint, resolve_resume
from dlmone_fast.models.denoiser import denoiser_from_folder
from dlmone_fast.models.folder import load_folder
from dlmone_fast.models.manifest import hash_file
from dlmone_fast.runtime.loading import load_model
from dlmone_fast.training.distill_phase import DistillPhase
from dlmone_fast.training.loop import Phase
from dlmone_fast.training.pairs_phase import PairsPhase, load_pairs
from dlmone_fast.training.teacher_phase import TeacherPhase
from dlmone_fast.training.workspace import Workspace, open_workspace

MODELS = ("teacher", "stage1", "stage2")
PHASES = ("teacher", "pairs", "stage1", "stage2")


@pytest.fixture(scope="module")
def run_root(uninterrupted: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a finished run, to be damaged and repaired."""
    return Path(shutil.copytree(uninterrupted, tmp_path_factory.mktemp("corruption") / "run"))


def load_as_a_user(folder: Path) -> None:
    load_model(folder, "cpu", backend="eager").unload()


def resume_as_a_run(path: Path) -> None:
    """By its path it is refused; "auto" goes back to the one before."""
    steps = [step for step, _ in list_checkpoints(path.parent)]
    with pytest.raises(CheckpointError):
        resolve_resume(path.parent, path)
    try:
        found = resolve_resume(path.parent, "auto")
        assert found is not None
        assert load_checkpoint(found).step == steps[-2]
    # The error that the caller waits for is that of the damaged one.
    except CheckpointError as error:
        raise AssertionError(f"{path.parent}: did not go back to step {steps[-2]}") from error
    load_checkpoint(path)


def subjects(root: Path) -> Iterator[tuple[Path, type[DlmOneError], Callable[[Path], None]]]:
    """Every folder of the run that a manifest proves, its error class, and how it is opened."""
    for name in MODELS:
        yield root / name, ModelFileError, load_as_a_user
    for name in PHASES:
        newest = list_checkpoints(root / "checkpoints" / name)[-1][1]
        yield newest, CheckpointError, resume_as_a_run


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hash_file(path) for path in sorted(folder.iterdir())}


def test_every_corruption_is_a_named_error(run_root: Path, campaign: bool, figure: Figure) -> None:
    count, refused = 1500 if campaign else 210, Counter[str]()
    opened = list(subjects(run_root))
    before = [hashes(folder) for folder, _, _ in opened]
    for case in range(count):
        rng = random.Random(f"corruption {case}")
        folder, error, load = opened[case % len(opened)]
        kind = DAMAGES[case // len(opened) % len(DAMAGES)]
        path = folder / rng.choice(sorted(before[case % len(opened)]))
        content = path.read_bytes()
        damage(path, kind, rng)
        with pytest.raises(DlmOneError) as caught:
            load(folder)
        path.write_bytes(content)
        assert caught.type is error, (case, caught.value)
        # A damaged manifest may blame the file that it now misstates.
        blamed = folder if path.name == "manifest.json" else path
        assert str(blamed) in str(caught.value), (case, caught.value)
        refused[kind] += 1
    # That the same folders load when nothing is done to them.
    for (folder, _, _), expected in zip(opened, before, strict=True):
        assert hashes(folder) == expected
        load_checkpoint(folder) if folder.name.startswith("step") else load_as_a_user(folder)
    assert set(refused) == set(DAMAGES)
    figure(
        "R3", f"corruptions of {len(opened)} model folders and checkpoints, {len(refused)} kinds",
        "all a named error of the documented class", f"{refused.total():,} of {count:,}",
    )  # fmt: skip


def test_a_checkpoint_that_is_not_gone_back_to_is_a_failure(run_root: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(run_root / "checkpoints" / "teacher", tmp_path / "teacher"))
    (_, older), (_, newest) = list_checkpoints(root)[-2:]
    for path in (newest, older):
        damage(path / "model.safetensors", "flip", random.Random(0))
    with pytest.raises(AssertionError, match="did not go back to step"):
        resume_as_a_run(newest)


def _first_float(tensors: dict[str, Tensor], rng: random.Random) -> str:
    return rng.choice(sorted(n for n, t in tensors.items() if t.is_floating_point() and t.numel()))


def _missing(tensors: dict[str, Tensor], rng: random.Random) -> None:
    del tensors[rng.choice(sorted(tensors))]


def _unexpected(tensors: dict[str, Tensor], rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    tensors[f"{name}{rng.randrange(10)}"] = tensors[name].clone()


def _renamed(tensors: dict[str, Tensor], rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    tensors[name[::-1]] = tensors.pop(name)


def _misshapen(tensors: dict[str, Tensor], rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    shapes = [value[None], value.repeat(2, *[1] * (value.dim() - 1)), value.flatten()[:-1]]
    different = [shape for shape in shapes if shape.shape != value.shape]
    tensors[name] = rng.choice(different).contiguous()


def _retyped(tensors: dict[str, Tensor], rng: random.Random) -> None:
    name = rng.choice(sorted(tensors))
    kinds = [torch.float16, torch.float64, torch.int32, torch.complex64, torch.float8_e4m3fn]
    tensors[name] = (
        tensors[name].float().to(rng.choice([k for k in kinds if k != tensors[name].dtype]))
    )


def _not_finite(tensors: dict[str, Tensor], rng: random.Random) -> None:
    value = tensors[_first_float(tensors, rng)].view(-1)
    value[rng.randrange(len(value))] = rng.choice([torch.nan, torch.inf, -torch.inf])


CHANGES: dict[str, Callable[[dict[str, Tensor], random.Random], None]] = {
    "missing": _missing, "unexpected": _unexpected, "renamed": _renamed, "shape": _misshapen,
    "dtype": _retyped, "not finite": _not_finite,
}  # fmt: skip


def phases(workspace: Workspace) -> dict[str, Phase]:
    """The phases of a run before their first step."""
    teacher = load_folder(workspace.model("teacher"))
    student = load_folder(workspace.model("stage1"))
    pairs, _ = load_pairs(workspace)

    def stage(index: int, start: Any) -> DistillPhase:
        networks = denoiser_from_folder(teacher), denoiser_from_folder(start).lm.backbone
        return DistillPhase(workspace, index, *networks, {}, pairs if index == 1 else None)

    return {
        "teacher": TeacherPhase(workspace, {}),
        "pairs": PairsPhase(workspace, denoiser_from_folder(teacher), {}),
        "stage1": stage(1, teacher),
        "stage2": stage(2, student),
    }


def restore(folder: Path, phase: Phase | None) -> None:
    """Read a checkpoint into the phase, as a resume does; without one, load a model folder."""
    if phase is None:
        load_as_a_user(folder)
    else:
        phase.restore(load_checkpoint(folder))


def workspace_of(root: Path) -> Workspace:
    values = merge(load_toml(root / "config.toml"), {"output_dir": str(root)})
    return open_workspace(from_dict(values))


def test_sealed_weights_that_do_not_fit_are_named_errors(
    run_root: Path, campaign: bool, figure: Figure
) -> None:
    """Tensors missing, unexpected, misshapen, of another dtype or not finite, sealed all the same.

    Checkpoints are restored into the phases of the run, as a resume does.
    """
    live = phases(workspace_of(run_root))
    files = [(folder / "model.safetensors", "") for folder in (run_root / name for name in MODELS)]
    for name in PHASES:
        newest = list_checkpoints(run_root / "checkpoints" / name)[-1][1]
        files += [(path, name) for path in sorted(newest.glob("*.safetensors"))]
    count, refused = 600 if campaign else 2 * len(files), Counter[str]()
    for case in range(count):
        rng = random.Random(f"sealed {case}")
        path, phase = files[case % len(files)]
        change = list(CHANGES)[(case + case // len(files)) % len(CHANGES)]
        kept = {p.name: p.read_bytes() for p in (path, path.with_name("manifest.json"))}
        if path.stem == "pairs" and change == "not finite":
            change = "dtype"
        edit_tensors(path, lambda tensors, c=change, r=rng: CHANGES[c](tensors, r))
        error = CheckpointError if phase else ModelFileError
        with pytest.raises(error) as caught:
            restore(path.parent, live.get(phase))
        for name, content in kept.items():
            path.with_name(name).write_bytes(content)
        assert str(path if phase else path.parent) in str(caught.value), caught.value
        refused[change] += 1
    for name, phase in live.items():
        phase.restore(load_checkpoint(list_checkpoints(run_root / "checkpoints" / name)[-1][1]))
    assert set(refused) == set(CHANGES)
    figure(
        "R3", "weights and optimiser states that do not fit, sealed again",
        "all a named error of the documented class", f"{refused.total():,} of {count:,}",
    )  # fmt: skip


def test_sealed_settings_that_lack_a_key_are_named_errors(run_root: Path, figure: Figure) -> None:
    """No default may stand for what a model was made with."""
    folder, lacking = run_root / "stage2", 0
    kept = {path.name: path.read_bytes() for path in folder.iterdir()}
    config = load_folder(folder).config
    later = {"source", "source_positions", "source_window", "start_from", "self_conditioning"}
    cases = [(s, key) for s in ("model", "diffusion") for key in config[s] if key not in later]
    for section, key in [*cases, ("", "kind"), ("", "model"), ("", "diffusion"), ("", "format")]:
        edit_json(
            folder / "config.json",
            lambda content, s=section, k=key: (content[s] if s else content).pop(k),
        )
        with pytest.raises(ModelFileError, match=rf"config\.json: .*{key}"):
            load_as_a_user(folder)
        for name, content in kept.items():
            (folder / name).write_bytes(content)
        lacking += 1
    load_as_a_user(folder)
    figure(
        "R3", "a key of config.json missing, sealed again", "all a named error",
        f"{lacking:,} of {lacking:,} keys",
    )  # fmt: skip
