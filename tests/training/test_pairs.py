"""The teacher's paired endpoints: what they are, and that they are made once and exactly."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from resealing import edit_json, edit_tensors

from dlmone_fast.config import Config, to_toml
from dlmone_fast.data.batches import batch
from dlmone_fast.data.rows import load_rows
from dlmone_fast.errors import CheckpointError, ConfigError, UsageError
from dlmone_fast.kernels.noise import Stream, normal, permutation
from dlmone_fast.models.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from dlmone_fast.models.denoiser import load_teacher
from dlmone_fast.models.folder import load_folder, save_folder
from dlmone_fast.runtime import GenerationSettings, Generator, executor
from dlmone_fast.training import RunResult, distill, run
from dlmone_fast.training.pairs_phase import Pairs, PairsPhase, load_pairs
from dlmone_fast.training.workspace import Workspace, open_workspace

Make = Callable[..., Config]
PAIRS = {"count": 14, "per_source": 3, "steps": 4, "batch_size": 4, "save_every": 2}


def _with_estimates(teacher: Path, path: Path) -> Path:
    """The teacher with a random projection of its estimates, which then matter."""
    folder = load_folder(teacher)
    model = folder.config["model"]
    weight = torch.randn(
        model["hidden_size"], model["embedding_dim"], generator=torch.Generator().manual_seed(0)
    )
    assert folder.tokenizer_path is not None
    return save_folder(
        path,
        config={**folder.config, "model": {**model, "self_conditioning": True}},
        tensors={**folder.tensors, "backbone.estimate_projection.weight": weight},
        tokenizer_json=folder.tokenizer_path.read_text(encoding="utf-8"),
        generation_config=folder.generation_config,
    )


class CrashError(Exception):
    """Something outside the program's control."""


def made(workspace: Workspace) -> Pairs:
    return load_pairs(workspace)[0]


def same(a: Pairs, b: Pairs) -> bool:
    tensors = zip((a.rows, a.samples, a.ids), (b.rows, b.samples, b.ids), strict=True)
    return a.seed == b.seed and all(torch.equal(x, y) for x, y in tensors)


@pytest.fixture
def config(tiny: Make, tmp_path: Path) -> Config:
    return tiny(tmp_path / "run", distill={"pairs": PAIRS})


@pytest.fixture(scope="session")
def whole(tiny: Make, finished: RunResult, tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Pairs made without interruption. Do not write to it."""
    root = tmp_path_factory.mktemp("pairs") / "run"
    config = tiny(root, distill={"pairs": PAIRS})
    return run(config, "pairs", teacher=finished.root / "teacher").workspace


def test_rows_come_in_a_seeded_order_each_with_its_own_noises(whole: Workspace) -> None:
    pairs = made(whole)
    order = permutation(pairs.seed, Stream.PAIR_ORDER, 0, 300)
    assert pairs.rows.tolist() == order[:5].repeat_interleave(3)[:14].tolist()
    assert pairs.samples.tolist() == ([0, 1, 2] * 5)[:14]
    assert (pairs.ids.dtype, pairs.ids.shape) == (torch.uint16, (14, 28))
    z = pairs.latents(torch.tensor([4, 13]), 16, torch.device("cpu"))
    for of_pair, index in zip(z, (4, 13), strict=True):
        draw = (int(pairs.rows[index]), int(pairs.samples[index]))
        assert torch.equal(of_pair, normal(pairs.seed, Stream.PAIR_LATENT, *draw, 28, 16)[0])
    assert not torch.equal(z[0], z[1])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("samples"), "1 tensor missing: samples"),
        (
            lambda t: t.update(rows=t["rows"][:5]),
            r"rows \(expected \[14\] int32, found \[5\]",
        ),
        (lambda t: t.update(ids=t["ids"].int()), r"ids \(expected \[14, 28\] uint16, found"),
        (lambda t: t["rows"].fill_(300), r"rows must lie in 0 … 299"),
        (lambda t: t["ids"].fill_(199), r"ids must lie in 0 … 198"),
    ],
)
def test_pairs_that_do_not_fit_are_named(
    whole: Workspace, tmp_path: Path, change: Callable[..., Any], message: str
) -> None:
    path = whole.newest("pairs")
    assert path is not None
    copied = replace(whole, root=tmp_path)
    folder = shutil.copytree(path, copied.checkpoints("pairs") / path.name)
    edit_tensors(folder / "pairs.safetensors", change)
    with pytest.raises(CheckpointError, match=message):
        load_pairs(copied)


def test_a_second_epoch_brings_new_noises_of_the_same_rows(
    tiny: Make, finished: RunResult, tmp_path: Path
) -> None:
    count = {"count": 604, "per_source": 2, "steps": 1, "batch_size": 604}
    config = tiny(tmp_path / "run", distill={"pairs": count})
    pairs = made(run(config, "pairs", teacher=finished.root / "teacher").workspace)
    again = permutation(pairs.seed, Stream.PAIR_ORDER, 1, 300)[:2]
    assert pairs.rows[600:].tolist() == again.repeat_interleave(2).tolist()
    assert pairs.samples[600:].tolist() == [2, 3, 2, 3]
    assert len(set(zip(pairs.rows.tolist(), pairs.samples.tolist(), strict=True))) == 604


@pytest.mark.parametrize("self_conditioning", [False, True])
@pytest.mark.parametrize(
    ("sampler", "temperature"), [("ddim", 1.0), ("dpm-solver++", 0.5), ("q-sampling", 0.7)]
)
def test_an_endpoint_is_what_the_teacher_generates_from_the_same_noise(
    tiny: Make,
    finished: RunResult,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    sampler: str,
    temperature: float,
    self_conditioning: bool,
) -> None:
    teacher = finished.root / "teacher"
    if self_conditioning:
        teacher = _with_estimates(teacher, tmp_path / "teacher")
    settings = {"sampler": sampler, "temperature": temperature}
    config = tiny(tmp_path / "run", distill={"pairs": {**PAIRS, **settings}})
    workspace = run(config, "pairs", teacher=teacher).workspace
    pairs = made(workspace)
    rows = load_rows(workspace.data_dir, "train")
    generator = Generator(
        load_teacher(teacher),
        workspace.tokenizer,
        GenerationSettings(kind="teacher", steps=4, max_source_tokens=14, **settings),
    )
    every, cpu = slice(0, 14), torch.device("cpu")
    monkeypatch.setattr(
        executor, "_noise_of", lambda *_: lambda call: pairs.latents(every, 16, cpu, call)
    )
    found = generator.generate_candidates(
        [rows[row].src for row in pairs.rows.tolist()], seeds=[0] * 14, progress=False
    )
    ids, mask = batch(workspace.cache("train"), pairs.rows.long(), 28, workspace.tokenizer)
    for index, (target,) in enumerate(found.token_ids):
        assert pairs.ids[index].long()[mask[index] != 0].tolist() == target
    # The source's own ids stand beside them.
    assert torch.equal(pairs.ids.long()[mask == 0], ids[mask == 0])
    assert len({tuple(target) for (target,) in found.token_ids}) > 7
    # Each call of the sampler has a noise of its own.
    assert not torch.equal(pairs.latents(every, 16, cpu, 1), pairs.latents(every, 16, cpu))


@pytest.mark.parametrize("at", range(4))
def test_pairs_interrupted_after_any_update_are_the_uninterrupted_ones(
    config: Config,
    whole: Workspace,
    finished: RunResult,
    monkeypatch: pytest.MonkeyPatch,
    at: int,
) -> None:
    teacher, original = finished.root / "teacher", PairsPhase.update

    def update(self: PairsPhase, step: int) -> dict[str, float]:
        values = original(self, step)
        if step == at:
            raise CrashError
        return values

    monkeypatch.setattr(PairsPhase, "update", update)
    with pytest.raises(CrashError):
        run(config, "pairs", teacher=teacher)
    monkeypatch.setattr(PairsPhase, "update", original)
    workspace = run(config, "pairs", teacher=teacher).workspace
    assert same(made(workspace), made(whole))
    assert [step for step, _ in list_checkpoints(workspace.checkpoints("pairs"))] == [2, 4]


def test_finished_pairs_are_not_made_again_and_no_model_is_published(
    whole: Workspace, finished: RunResult, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(PairsPhase, "update", lambda *_: pytest.fail("made again"))
    result = run(whole.config, "pairs", teacher=finished.root / "teacher")
    assert result.student is None
    assert not (whole.root / "pairs").exists()
    given = load_folder(finished.root / "teacher")
    assert given.tokenizer_path is not None
    other = save_folder(
        tmp_path / "other",
        config=given.config,
        tensors={name: 2 * tensor for name, tensor in given.tensors.items()},
        tokenizer_json=given.tokenizer_path.read_text(encoding="utf-8"),
        generation_config=given.generation_config,
    )
    with pytest.raises(ConfigError, match=r"step-00000004: was made from another teacher"):
        run(whole.config, "pairs", teacher=other)


def test_starting_over_makes_the_pairs_again(
    config: Config, finished: RunResult, monkeypatch: pytest.MonkeyPatch
) -> None:
    teacher, seen = finished.root / "teacher", []
    original = PairsPhase.update

    def update(self: PairsPhase, step: int) -> dict[str, float]:
        seen.append(step)
        return original(self, step)

    monkeypatch.setattr(PairsPhase, "update", update)
    for resume in ("auto", "auto", "never"):
        run(config, "pairs", teacher=teacher, resume=resume)
    assert seen == [0, 1, 2, 3] * 2
    for needs in (lambda: distill(config, teacher), lambda: run(config, teacher=teacher)):
        with pytest.raises(ConfigError, match="neither stage reads the pairs: set anchor_steps"):
            needs()
    stage = replace(config.distill.stage1, anchor_steps=1)
    config = replace(
        config,
        output_dir=f"{config.output_dir}-anchored",
        distill=replace(config.distill, stage1=stage),
    )
    for _ in range(2):
        distill(config, teacher, resume="never")
    assert seen == [0, 1, 2, 3] * 4


def test_pairs_of_other_settings_are_refused(
    tiny: Make, whole: Workspace, finished: RunResult, tmp_path: Path
) -> None:
    path = list_checkpoints(whole.checkpoints("pairs"))[0][1]
    for name, changes in (("seed", {"seed": 5}), ("steps", {"distill": {"pairs": {"steps": 3}}})):
        pairs = {**PAIRS, **changes.get("distill", {}).get("pairs", {})}
        config = tiny(tmp_path / name, **{**changes, "distill": {"pairs": pairs}})
        workspace = open_workspace(config)
        phase = PairsPhase(workspace, load_teacher(finished.root / "teacher"), {})
        with pytest.raises(CheckpointError, match="its pairs were made with"):
            phase.restore(load_checkpoint(path))


def test_phases_that_need_pairs_say_so(
    tiny: Make, finished: RunResult, tmp_path: Path, config: Config
) -> None:
    teacher = finished.root / "teacher"
    with pytest.raises(UsageError, match=r"has nothing to make: set --distill\.pairs\.count"):
        run(tiny(tmp_path / "none"), "pairs", teacher=teacher)
    anchored: dict[str, Any] = {"pairs": PAIRS, "stage1": {"anchor_steps": 2}}
    with pytest.raises(UsageError, match="does not hold all of them; run --phase pairs first"):
        run(tiny(tmp_path / "anchored", distill=anchored), "stage1", teacher=teacher)
    # Half of the pairs are not all of them.
    workspace = open_workspace(tiny(tmp_path / "half", distill=anchored))
    phase = PairsPhase(workspace, load_teacher(teacher), workspace.inputs(teacher=teacher))
    for step in (0, 1):
        phase.update(step)
    tensors, state = phase.state()
    assert len(tensors["pairs"]["ids"]) == 8
    save_checkpoint(
        workspace.checkpoints("pairs"), 2, tensors,
        {**state, "phase": "pairs", "inputs": phase.inputs}, to_toml(workspace.config),
    )  # fmt: skip
    assert not workspace.finished("pairs")
    with pytest.raises(UsageError, match="run --phase pairs first"):
        run(workspace.config, "stage1", teacher=teacher)


def test_every_noise_of_the_most_calls_that_a_configuration_allows_exists(
    tiny: Make, tmp_path: Path
) -> None:
    many = {**PAIRS, "sampler": "q-sampling", "steps": 256}
    assert tiny(tmp_path, distill={"pairs": many}).distill.pairs.steps == 256
    assert tiny(tmp_path, distill={"pairs": {**many, "sampler": "ddim", "steps": 257}})
    with pytest.raises(
        ConfigError, match=r"distill\.pairs\.steps must be at most 256 .*q-sampling"
    ):
        tiny(tmp_path, distill={"pairs": {**many, "steps": 257}})
    last = torch.tensor([(1 << 24) - 1], dtype=torch.int32)
    pairs = Pairs(0, torch.zeros_like(last), last, torch.zeros(1, 2, dtype=torch.uint16))
    # The first call starts from noise as well: the last one is call 255.
    assert pairs.latents(slice(0, 1), 4, torch.device("cpu"), call=255).shape == (1, 2, 4)


def test_rounding_the_teachers_predictions_changes_the_pairs(
    tiny: Make, finished: RunResult, tmp_path: Path
) -> None:
    teacher = finished.root / "teacher"
    ends = []
    for rounded in (False, True):
        pairs = {**PAIRS, "sampler": "q-sampling", "rounded": rounded}
        config = tiny(tmp_path / str(rounded), distill={"pairs": pairs})
        ends.append(made(run(config, "pairs", teacher=teacher).workspace).ids)
    assert not torch.equal(*ends)


def test_pairs_of_before_the_later_settings_are_read(
    whole: Workspace, finished: RunResult, tmp_path: Path
) -> None:
    copied = replace(whole, root=tmp_path / "copy")
    path = whole.newest("pairs")
    assert path is not None
    folder = shutil.copytree(path, copied.checkpoints("pairs") / path.name)
    later = ("targets", "rounded")

    def forget(head: dict[str, Any]) -> None:
        for key in later:
            del head["state"]["made_with"][key]

    edit_json(folder / "state.json", forget)
    assert torch.equal(made(copied).ids, made(whole).ids)
