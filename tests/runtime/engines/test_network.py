"""The inference network computes what the denoiser computes."""

from __future__ import annotations

import itertools

import pytest
import tiny
import torch

from dlmone_fast.kernels import dispatch
from dlmone_fast.kernels.triton import support
from dlmone_fast.runtime.engines import linear
from dlmone_fast.runtime.engines.network import DTYPES, InferenceNetwork

SHAPES = ((1, 20), (3, 7), (5, 1), (2, 13))
DEVICES = ("cpu", pytest.param("cuda", marks=pytest.mark.skipif("not torch.cuda.is_available()")))


@pytest.fixture(autouse=True)
def frozen():
    with torch.inference_mode():
        yield


def inputs(batch: int, length: int, width: int = 16, seed: int = 0) -> torch.Tensor:
    return torch.randn(batch, length, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("norm", "fused"), list(itertools.product(("pre", "post"), (False, True))))
def test_fp32_is_the_denoisers(norm: str, fused: bool, device: str):
    denoiser = tiny.denoiser(norm=norm, num_layers=3).to(device)
    network = InferenceNetwork(denoiser, "fp32", fused=fused)
    for batch, length in SHAPES:
        x_t, t = inputs(batch, length).to(device), torch.full((batch,), 30, device=device)
        torch.testing.assert_close(network(x_t, t), denoiser(x_t, t), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize(("norm", "fused"), list(itertools.product(("pre", "post"), (False, True))))
def test_positions_that_nobody_reads_are_left_out(norm: str, fused: bool, layers: int, device: str):
    denoiser = tiny.denoiser(norm=norm, num_layers=layers).to(device)
    network = InferenceNetwork(denoiser, "fp32", fused=fused)
    x_t, t = inputs(3, 13).to(device), torch.full((3,), 30, device=device)
    whole = denoiser(x_t, t)
    for first in (0, 5, 12):
        torch.testing.assert_close(network(x_t, t, first), whole[:, first:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_one_layer_and_other_activations_of_packed_weights(
    norm: str, monkeypatch: pytest.MonkeyPatch
):
    if not linear.can_pack(torch.float32):
        pytest.skip("no packed products here")
    monkeypatch.setattr(linear, "_FEWEST_PACKED", 1)
    denoiser = tiny.denoiser(norm=norm, num_layers=1)
    network = InferenceNetwork(denoiser, "fp32")
    assert network._layers[0].qkv.packed is not None
    for batch, length in SHAPES:
        x_t, t = inputs(batch, length), torch.full((batch,), 30)
        torch.testing.assert_close(network(x_t, t), denoiser(x_t, t), rtol=1e-5, atol=1e-5)


def test_rows_may_have_timesteps_of_their_own():
    denoiser = tiny.denoiser()
    network = InferenceNetwork(denoiser, "fp32")
    x_t, t = inputs(4, 20), torch.tensor([0, 39, 7, 7])
    torch.testing.assert_close(network(x_t, t), denoiser(x_t, t), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(network.time(t)[1:2], network.time_of(39))


def test_a_timestep_is_embedded_once(monkeypatch: pytest.MonkeyPatch):
    network = InferenceNetwork(tiny.denoiser(), "fp32")
    first = network.time(torch.full((3,), 9))
    monkeypatch.setattr(network, "_embed_time", None)
    assert torch.equal(network.time(torch.full((3,), 9)), first)


@pytest.mark.parametrize(("fused", "limit"), [(False, 1.5), (True, 3.0)])
@pytest.mark.parametrize(
    ("norm", "precision"), list(itertools.product(("pre", "post"), ("bf16", "fp16")))
)
def test_sixteen_bits_err_like_autocast(norm: str, precision: str, fused: bool, limit: float):
    # Fused blocks keep the residual stream in 16 bits, which autocast does not.
    denoiser = tiny.denoiser(norm=norm, hidden_size=64, num_layers=4)
    network = InferenceNetwork(denoiser, precision, fused=fused)
    x_t, t = inputs(8, 20), torch.full((8,), 30)
    exact = denoiser(x_t, t)
    with torch.autocast("cpu", DTYPES[precision]):
        usual = (denoiser(x_t, t) - exact).square().mean().sqrt()
    found = network(x_t, t)
    assert found.dtype == torch.float32
    assert 0 < (found - exact).square().mean().sqrt() <= limit * usual


def test_fp32_weights_are_shared():
    denoiser = tiny.denoiser()
    network = InferenceNetwork(denoiser, "fp32", pack=False)
    weight = network._layers[0].qkv.weight
    assert weight is not None
    assert weight.data_ptr() == denoiser.lm.backbone.blocks[0].attention.qkv.weight.data_ptr()


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_fused_blocks_fit_the_kernels_that_a_gpu_runs(norm: str):
    # In Triton's interpreter where there is no GPU.
    if not (torch.cuda.is_available() or support.interpreting()):
        pytest.skip("Triton cannot run here")
    denoiser = tiny.denoiser(norm=norm).to("cuda" if torch.cuda.is_available() else "cpu")
    x_t = inputs(3, 20).to(denoiser.embedding.device)
    t = torch.full((3,), 30, device=x_t.device)
    for precision, tolerance in (("fp32", 1e-5), ("bf16", 0.1), ("fp16", 0.02)):
        network = InferenceNetwork(denoiser, precision, fused=True)
        with dispatch.force_backend("triton"):
            found = network(x_t, t)
        torch.testing.assert_close(found, denoiser(x_t, t), rtol=tolerance, atol=tolerance)
