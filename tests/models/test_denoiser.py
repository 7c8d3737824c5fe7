"""What the denoiser accepts, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from resealing import edit_json, edit_tensors

from dlmone_fast import load_teacher
from dlmone_fast.errors import ModelFileError, UsageError
from dlmone_fast.models.denoiser import denoiser_from_folder
from dlmone_fast.models.folder import load_folder

B, L, D = 3, tiny.SEQ_LEN, 16


@pytest.fixture(scope="module")
def denoiser():
    return tiny.denoiser()


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(B, L, D, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "t", [7, torch.tensor(7), torch.full((B,), 7, dtype=torch.int32), torch.full((B,), 7).byte()]
)
def test_t_may_be_one_for_all_rows_and_of_any_whole_type(denoiser, x, t):
    expected = torch.full((B,), 7)
    ids = torch.zeros(B, L, dtype=torch.int32)
    mask = torch.ones(B, L)
    assert torch.equal(denoiser(x, t), denoiser(x, expected))
    q_sample = denoiser.schedule.q_sample
    assert torch.equal(q_sample(x, t, x, mask), q_sample(x, expected, x, mask))
    found = denoiser.loss(ids, mask, t, embedding_noise=x, noise=x)
    wanted = denoiser.loss(ids.long(), mask, expected, embedding_noise=x, noise=x)
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)
    assert torch.equal(denoiser.ancestral_step(x, t, x), denoiser.ancestral_step(x, expected, x))


def test_weights_without_a_vocabulary_are_refused(tmp_path):
    tiny.save(tmp_path, with_tokenizer=False)
    edit_json(tmp_path / "config.json", lambda content: content["model"].update(vocab_size=0))

    def cut(tensors):
        tensors.update({name: tensors[name][:0] for name in ("tokens.weight", "tokens.bias")})

    edit_tensors(tmp_path / "model.safetensors", cut)
    with pytest.raises(ModelFileError, match=r"config\.json: model: vocab_size must be at least 1"):
        load_teacher(tmp_path)


@pytest.mark.parametrize(
    "t", [-1, 40, 3.5, torch.full((B,), 7.0), torch.zeros(B + 1).long(), torch.ones(B).bool()]
)
def test_another_t_is_refused(denoiser, x, t):
    for call in (
        lambda: denoiser(x, t),
        lambda: denoiser.schedule.q_sample(x, t, x),
        lambda: denoiser.published_ddim_step(x, t),
    ):
        with pytest.raises(UsageError, match="t must"):
            call()


def test_float64_inputs_are_taken_in_the_networks_precision(denoiser, x):
    wide = x.double()
    assert torch.equal(denoiser(wide, 5), denoiser(x, 5))
    assert torch.equal(denoiser.round(wide), denoiser.round(x))
    assert torch.equal(denoiser.logits(wide), denoiser.logits(x))
    assert torch.equal(denoiser.ancestral_step(wide, 5, x), denoiser.ancestral_step(x, 5, x))


def test_masks_may_be_boolean_or_as_wide_as_x(denoiser, x):
    mask = torch.arange(L).expand(B, L) >= 5
    q_sample = denoiser.schedule.q_sample
    expected = q_sample(x, 9, 2 * x, mask.long())
    assert torch.equal(expected[:, :5], x[:, :5])
    assert torch.equal(q_sample(x, 9, 2 * x, mask), expected)
    assert torch.equal(q_sample(x, 9, 2 * x, mask[..., None].expand_as(x)), expected)


@pytest.mark.parametrize("shape", [(L, D), (B, L, D + 1), (B, 513, D), (B, 0, D)])
def test_another_shape_is_refused(denoiser, shape):
    with pytest.raises(UsageError, match="x must be"):
        denoiser(torch.zeros(shape), 0)


def test_a_source_without_target_has_no_nll(denoiser, x):
    ids = torch.zeros(B, L, dtype=torch.int64)
    terms = denoiser.loss(ids, torch.zeros(B, L), 5, embedding_noise=x, noise=x)
    assert torch.equal(terms["nll"], torch.zeros(B))
    assert torch.isfinite(terms["loss"]).all()


def test_a_device_that_is_not_there_is_refused(tmp_path: Path):
    folder = tiny.save(tmp_path / "m", "teacher")
    assert load_teacher(folder, torch.device("cpu")).embedding.device.type == "cpu"
    for device in ("mps", "meta", "cuda:999"):
        with pytest.raises(UsageError, match="device"):
            load_teacher(folder, device)


@pytest.mark.parametrize(
    ("section", "key"),
    [("model", "norm"), ("model", "num_heads"), ("model", "normalize_embedding"),
     ("diffusion", "schedule"), ("diffusion", "num_timesteps")],
)  # fmt: skip
def test_no_default_stands_for_what_a_folder_lacks(tmp_path: Path, section: str, key: str) -> None:
    folder = load_folder(tiny.save(tmp_path / "model"))
    values = {name: value for name, value in folder.config[section].items() if name != key}
    lacking = replace(folder, config={**folder.config, section: values})
    with pytest.raises(ModelFileError, match=rf"config\.json: {section} lacks {key}; copy"):
        denoiser_from_folder(lacking)


def test_a_folder_from_before_self_conditioning_loads(tmp_path: Path, x) -> None:
    folder = load_folder(tiny.save(tmp_path / "model"))
    sizes = dict(folder.config["model"])
    assert sizes.pop("self_conditioning") is False
    old = denoiser_from_folder(replace(folder, config={**folder.config, "model": sizes}))
    assert torch.equal(old(x, 5), load_teacher(folder.path)(x, 5))
