from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor

import pytest
import tiny
import torch
from installed import skip_without
from resident import resident_bytes

from dlmone_fast.errors import (
    BackendUnavailableError,
    ForkedProcessError,
    ModelNotLoadedError,
    UsageError,
)
from dlmone_fast.kernels.nearest_token import Vocabulary
from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.runtime.engines import Engine, make_engine, why_unavailable
from dlmone_fast.runtime.engines.choose import EngineRequest
from dlmone_fast.runtime.pipeline import Pipeline
from dlmone_fast.runtime.rows import Rows

skip_without("openvino")

WIDTH, LENGTH = 16, tiny.SEQ_LEN


def inputs(rows: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    numbers = torch.Generator().manual_seed(seed)
    x_t = torch.randn(rows, LENGTH, WIDTH, generator=numbers)
    return x_t, torch.randint(0, 40, (rows,), generator=numbers)


@pytest.fixture(scope="module")
def network() -> Denoiser:
    return tiny.denoiser()


@pytest.fixture(scope="module")
def engine(network: Denoiser):
    engine = make_engine("openvino", EngineRequest(network, "fp32"))
    yield engine
    engine.close()


@pytest.fixture(scope="module")
def int8(network: Denoiser):
    skip_without("nncf")
    engine = make_engine("openvino", EngineRequest(network, "int8", lambda: inputs(40, seed=9)))
    yield engine
    engine.close()


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_fp32_is_the_networks_own_answer(norm: str):
    network = tiny.denoiser(norm=norm)
    numbers = torch.Generator().manual_seed(0)
    for name, weight in network.lm.backbone.named_parameters():
        # As after training: fresh norms scale by one and add nothing, as if they were left out.
        if "norm" in name or "bias" in name:
            weight += 0.3 * torch.randn(weight.shape, generator=numbers)
    engine = make_engine("openvino", EngineRequest(network, "fp32"))
    runner = engine.runner()
    for rows in (1, 3, 8, 1):
        x_t, t = inputs(rows, seed=rows)
        torch.testing.assert_close(runner.predict(x_t, t), network(x_t, t), atol=1e-4, rtol=0)
    engine.close()


def test_inputs_of_any_kind(engine: Engine, network: Denoiser):
    runner = engine.runner()
    x_t, t = inputs(3)
    strided = x_t.transpose(0, 1).contiguous().transpose(0, 1)
    expected = network(x_t, t)
    with torch.inference_mode():
        inside = runner.predict(x_t.clone(), t.clone())
    for found in (
        inside, runner.predict(strided, t), runner.predict(x_t.clone().requires_grad_(), t)
    ):  # fmt: skip
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert runner.predict(*inputs(0)).shape == (0, LENGTH, WIDTH)


def test_answers_are_the_callers_own(engine: Engine):
    runner = engine.runner()
    first = runner.predict(*inputs(2, seed=1))
    kept = first.clone()
    second = runner.predict(*inputs(2, seed=2))
    assert torch.equal(first, kept)
    assert not torch.equal(first, second)


def test_wrong_inputs_are_refused(engine: Engine):
    x_t, t = inputs(2)
    with pytest.raises(UsageError, match=r"x_t must be \[B, 20, 16\]"):
        engine.runner().predict(x_t[:, 1:], t)
    with pytest.raises(UsageError, match="t must lie in"):
        engine.runner().predict(x_t, t + 40)
    with pytest.raises(UsageError, match="one timestep a row"):
        engine.runner().predict(x_t, t[:1].repeat(3))


@pytest.mark.parametrize("steps", [1, 3])
def test_a_students_ids(engine: Engine, network: Denoiser, steps: int):
    vocabulary = Vocabulary(network.embedding)
    pipeline = Pipeline(network.schedule, vocabulary, 30, steps, True)
    mask = torch.zeros(5, LENGTH, dtype=torch.int64)
    mask[:, 7:] = 1
    ids = torch.randint(0, 60, mask.shape, generator=torch.Generator().manual_seed(0))
    batch = Rows(ids, mask, [3] * 5, range(5)).batch(steps)
    found, margins = engine.runner().ids(pipeline, batch)
    expected, expected_margins = pipeline.run(network, batch)
    assert torch.equal(found, expected)
    torch.testing.assert_close(margins, expected_margins, atol=1e-3, rtol=1e-3)


def test_runners_work_at_the_same_time(engine: Engine, network: Denoiser):
    def work(seed: int) -> bool:
        runner = engine.runner()
        rows = [inputs(1 + (seed + i) % 3, seed=seed + 10 * i) for i in range(10)]
        return all(
            torch.allclose(runner.predict(x_t, t), network(x_t, t), atol=1e-4) for x_t, t in rows
        )

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_is_told(engine: Engine):
    runner = engine.runner()
    runner.predict(*inputs(1))
    child = os.fork()
    if child == 0:
        try:
            runner.predict(*inputs(1))
        except ForkedProcessError as error:
            os._exit(7 if "fork" in str(error) else 8)
        os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def test_a_closed_engine_refuses(network: Denoiser):
    engine = make_engine("openvino", EngineRequest(network, "fp32"))
    runner = engine.runner()
    runner.predict(*inputs(1))
    engine.close()
    engine.close()
    with pytest.raises(ModelNotLoadedError, match="unloaded"):
        runner.predict(*inputs(1))
    with pytest.raises(ModelNotLoadedError, match="unloaded"):
        engine.runner().predict(*inputs(1))


def test_engines_that_were_closed_leave_nothing_behind(network: Denoiser):
    def cycle() -> None:
        engine = make_engine("openvino", EngineRequest(network, "fp32"))
        engine.runner().predict(*inputs(1))
        engine.close()

    for _ in range(5):
        cycle()
    before = resident_bytes()
    for _ in range(10):
        cycle()
    # A trace of the network would keep 40 MB.
    assert resident_bytes() - before < 10 << 20


def test_int8_is_close_and_repeats(int8: Engine, network: Denoiser):
    runner = int8.runner()
    for rows in (1, 5):
        x_t, t = inputs(rows, seed=rows)
        found, exact = runner.predict(x_t, t), network(x_t, t)
        error = (found - exact).norm() / exact.norm()
        # Not zero: products that stayed in fp32 would have no error.
        assert 1e-4 < error < 0.1
        assert torch.equal(found, runner.predict(x_t, t))


def test_int8_without_an_example_is_refused(network: Denoiser):
    skip_without("nncf")
    with pytest.raises(UsageError, match="there are none"):
        make_engine("openvino", EngineRequest(network, "int8", lambda: inputs(0)))


def test_refusals_name_their_reason(network: Denoiser, monkeypatch: pytest.MonkeyPatch):
    def reason(precision: str, **rest: object) -> str | None:
        return why_unavailable("openvino", EngineRequest(network, precision, **rest))

    assert reason("fp32") is None
    assert "no fp16" in reason("fp16")
    assert "prompts" in reason("int8")
    with pytest.raises(BackendUnavailableError, match="no fp16"):
        make_engine("openvino", EngineRequest(network, "fp16"))
    engines = "dlmone_fast.runtime.engines.openvino"
    monkeypatch.setattr(f"{engines}._has_bf16", lambda: False)
    assert "no bf16" in reason("bf16")
    monkeypatch.setattr(f"{engines}._has_bf16", lambda: True)
    assert reason("bf16") is None
    monkeypatch.setitem(sys.modules, "nncf", None)
    assert "dlmone_fast[cpu]" in reason("int8", examples=lambda: inputs(1))
    monkeypatch.setitem(sys.modules, "openvino", None)
    assert "dlmone_fast[cpu]" in reason("fp32")


def test_a_model_elsewhere_is_refused():
    with torch.device("meta"):
        network = tiny.denoiser().to("meta")
    assert "meta" in why_unavailable("openvino", EngineRequest(network, "fp32"))


SILENT = """
    import os, sys

    done = []

    def watch(event, arguments):
        writes = event == "open" and isinstance(arguments[1], str) and arguments[1][0] in "wax"
        if writes or event in ("os.mkdir", "os.rename", "subprocess.Popen", "socket.connect",
                               "socket.getaddrinfo", "socket.sendto"):
            done.append((event, arguments))

    import tiny
    import torch
    import dlmone_fast.runtime
    from dlmone_fast.runtime.engines import make_engine
    from dlmone_fast.runtime.engines.choose import EngineRequest

    assert "openvino" not in sys.modules and "nncf" not in sys.modules
    if {imported_before}:
        import openvino_telemetry
    sys.addaudithook(watch)
    rows = torch.zeros(4, dtype=torch.int64)
    examples = lambda: (torch.randn(4, tiny.SEQ_LEN, 16), rows)
    engine = make_engine("openvino", EngineRequest(tiny.denoiser(), {precision!r}, examples))
    engine.runner().predict(*examples())
    engine.close()
    assert ("openvino_telemetry" in sys.modules) == {imported_before}
    assert not done, done
    """


@pytest.mark.parametrize(("precision", "imported_before"), [("int8", False), ("fp32", True)])
def test_nothing_is_sent_written_or_printed(tmp_path, precision: str, imported_before: bool):
    if precision == "int8":
        skip_without("nncf")
    if imported_before:
        skip_without("openvino_telemetry")
    script = textwrap.dedent(SILENT).format(precision=precision, imported_before=imported_before)
    # Telemetry stays off by itself in continuous integration; here it must be the engine's doing.
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("CI", "TF_BUILD", "JENKINS_URL")
    }
    paths = [os.getcwd(), os.path.dirname(tiny.__file__)]
    environment |= {"HOME": str(tmp_path), "PYTHONPATH": os.pathsep.join(paths)}
    environment["PYTHONDONTWRITEBYTECODE"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert not list(tmp_path.iterdir())


SIGNALLED = """
    import gc, os, signal

    import tiny
    import torch
    from dlmone_fast.runtime.engines import make_engine
    from dlmone_fast.runtime.engines.choose import EngineRequest

    def made():
        rows = torch.zeros(4, dtype=torch.int64)
        engine = make_engine("openvino", EngineRequest(tiny.denoiser(), "fp32"))
        engine.runner().predict(torch.randn(4, tiny.SEQ_LEN, 16), rows)
        return engine

    received = []
    signal.signal(signal.SIGTERM, lambda *_: received.append(1))
    for first in (0, -1):
        engines = [made() for _ in range(3)]
        while engines:
            engines.pop(first).close()
            gc.collect()
            os.kill(os.getpid(), signal.SIGTERM)
    assert len(received) == 6
    """


def test_signals_are_received_after_engines_were_closed_in_any_order():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SIGNALLED)],
        env={**os.environ, "PYTHONPATH": os.path.dirname(tiny.__file__)},
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, (done.returncode, done.stderr)
