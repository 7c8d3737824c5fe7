"""Training steps are timed only where their first update is eager PyTorch's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from tiny_timed import TINY

from benchmarks.training import updates as training_updates
from benchmarks.training.cases import (
    DEFAULT,
    FULL,
    GENERATOR,
    SCORE,
    STEPS,
    TEACHER,
    Case,
    Update,
    work,
    workspace,
)
from benchmarks.training.updates import (
    OTHER_DROPOUT,
    OURS_COMPILED,
    OURS_EAGER,
    PLAIN,
    PLAIN_COMPILED,
    Contender,
    Lineup,
    Stepper,
    contenders,
    disagreement,
    stepper,
)
from dlmone_fast.config.presets import PRESETS
from dlmone_fast.kernels import dispatch
from dlmone_fast.training.optim import UpdateGuard

CPU = torch.device("cpu")
CASE = Case("tiny", replace(PRESETS["qqp-small"], model=TINY), 4)
TWO = [OURS_EAGER, PLAIN]

Spoil = Callable[[dict[str, float]], dict[str, float]]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Networks this small lose more than they gain by sharing work."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("runs")


def lineup(update: Update, folder: Path, found: list[Contender] = TWO) -> Lineup:
    made = Lineup(update, CPU, folder)
    made.add_all(found, compile_too=False)
    return made


@pytest.mark.parametrize(
    "case",
    [CASE, replace(CASE, precision="bf16"), replace(CASE, dropout=0.1)],
    ids=["fp32", "bf16", "dropout"],
)
@pytest.mark.parametrize("step", STEPS)
def test_implementations_agree_and_are_ready_to_time(step: str, case: Case, folder: Path):
    made = lineup(Update(step, case), folder)
    assert list(made.calls) == ["dlmone_fast", "eager"]
    assert {fields["at"] for fields in made.fields.values()} == {4}
    made.calls["dlmone_fast"]()
    made.check_guards()


@pytest.mark.parametrize("step", STEPS)
def test_every_implementation_starts_afresh_and_goes_on_from_its_own_update(
    step: str, folder: Path
):
    first, second = (stepper(Update(step, CASE), OURS_EAGER, CPU, folder) for _ in range(2))
    start = first()
    assert second() == start
    assert first() != start


def test_the_first_generator_update_has_both_terms(folder: Path):
    """ψ begins as a copy of φ, with a head of zeros: of a copy there would be nothing to check."""
    found = stepper(Update(GENERATOR, CASE), PLAIN, CPU, folder)()
    assert abs(found["sid"]) > 1e-3
    weight = CASE.config().distill.stage1.generator_adversarial_weight
    assert abs(found["adversarial"] - weight * math.log(2)) > 1e-4


def spoilt(name: str, spoil: Spoil) -> Callable[..., Stepper]:
    """`stepper`, but what the implementation of this name reports is changed."""

    def make(update: Update, contender: Contender, *rest: object) -> Stepper:
        made = stepper(update, contender, *rest)  # type: ignore[arg-type]
        if contender.name == name:
            right = made._update
            made._update = lambda step: spoil(right(step))
        return made

    return make


def test_a_wrong_peer_is_not_timed_and_a_wrong_one_of_ours_fails(
    monkeypatch: pytest.MonkeyPatch, folder: Path
):
    def off(values: dict[str, float]) -> dict[str, float]:
        return {**values, "score_gradient_norm": values["score_gradient_norm"] * 1.0003}

    other = Contender("other", "torch")
    monkeypatch.setattr(training_updates, "stepper", spoilt("other", off))
    made = lineup(Update(SCORE, CASE), folder, [*TWO, other])
    assert made.fields["other"]["note"].startswith("wrong, so not timed: score_gradient_norm is")
    assert list(made.calls) == ["dlmone_fast", "eager"]
    monkeypatch.setattr(training_updates, "stepper", spoilt("dlmone_fast", off))
    with pytest.raises(pytest.fail.Exception, match="score_gradient_norm is"):
        lineup(Update(SCORE, CASE), folder)


def test_a_failing_peer_is_named(monkeypatch: pytest.MonkeyPatch, folder: Path):
    def fails(values: dict[str, float]) -> dict[str, float]:
        raise RuntimeError("no compiler\nmore")

    monkeypatch.setattr(training_updates, "stepper", spoilt("other", fails))
    made = lineup(Update(TEACHER, CASE), folder, [*TWO, Contender("other", "torch")])
    assert made.fields["other"] == {"note": "failed: RuntimeError: no compiler"}


def test_a_difference_is_named():
    exact = {"loss": 2.0, "gradient_norm": 1.0}
    assert disagreement({"loss": 2.0001, "gradient_norm": 1.0}, exact, 1e-4) == ""
    for loss in (2.0003, math.nan):
        found = disagreement({"loss": loss, "gradient_norm": 1.0}, exact, 1e-4)
        assert found == f"loss is {loss:.7g}, not 2"
    # A norm is missing where the update was skipped.
    assert disagreement({"loss": 2.0}, exact, 1.0) == "it reports loss, not loss, gradient_norm"


def test_skipped_updates_are_no_updates(folder: Path):
    made = lineup(Update(TEACHER, CASE), folder)
    made.calls["eager"].guard.skipped = 2
    with pytest.raises(pytest.fail.Exception, match=r"eager, teacher step.*2 of its updates"):
        made.check_guards()


def test_compiled_networks_are_named_where_they_are_not_timed(folder: Path):
    found = [*TWO, PLAIN_COMPILED]
    made = lineup(Update(TEACHER, CASE), folder, found)
    assert made.fields["torch.compile"]["note"].endswith("with --full")
    other = Lineup(Update(TEACHER, replace(CASE, dropout=0.1)), CPU, folder)
    other.add_all(found, compile_too=True)
    assert other.fields["torch.compile"]["note"] == OTHER_DROPOUT
    assert workspace(CASE, CPU, True, folder).config.compile
    assert not workspace(CASE, CPU, False, folder).config.compile


def test_ours_come_first_and_choose_kernels_themselves():
    assert contenders(CPU) == [OURS_EAGER, PLAIN, PLAIN_COMPILED]
    assert contenders(torch.device("cuda"))[:2] == [OURS_EAGER, OURS_COMPILED]

    def asked(contender: Contender) -> str:
        seen: list[str] = []

        def update(step: int) -> dict[str, float]:
            seen.append(dispatch.requested("noise"))
            return {}

        Stepper(contender, update, UpdateGuard(1))()
        return seen[0]

    assert [asked(each) for each in TWO] == [dispatch.AUTO, "torch"]


def test_floors_count_the_products_of_each_step():
    found = {step: work(Update(step, CASE)) for step in STEPS}
    assert all(each.flops > 0 and each.bytes > 0 for each in found.values())
    assert found[TEACHER].flops < found[SCORE].flops == found[GENERATOR].flops
    assert found[TEACHER].bytes < found[SCORE].bytes < found[GENERATOR].bytes
    assert work(Update(SCORE, replace(CASE, precision="bf16"))).precision == "bf16"
    doubled = work(Update(GENERATOR, replace(CASE, batch=8)))
    assert doubled.flops == 2 * found[GENERATOR].flops
    assert doubled.bytes == found[GENERATOR].bytes


def test_without_a_discriminator_the_score_estimator_sees_no_real_text():
    distill = CASE.recipe.distill
    stage = replace(distill.stage1, score_adversarial_weight=0.0)
    recipe = replace(CASE.recipe, distill=replace(distill, stage1=stage))
    without = replace(CASE, recipe=recipe)
    assert work(Update(SCORE, without)).flops < work(Update(GENERATOR, without)).flops


def test_cases_have_distinct_names_that_say_what_differs():
    for device in ("cpu", "cuda"):
        names = [str(update) for update in (*DEFAULT[device], *FULL[device])]
        assert len(set(names)) == len(names)
    assert str(DEFAULT["cpu"][0]) == "teacher step, compact, batch 8"
    assert str(replace(CASE, precision="bf16", dropout=0.1)) == "tiny, batch 4, bf16, dropout 0.1"
    assert Update(SCORE, CASE).operation == "training: score estimator step"
    sizes = {(u.case.model, u.case.batch, u.case.precision) for u in DEFAULT["cuda"]}
    for precision in ("fp32", "bf16"):
        assert {("BERT-base", n, precision) for n in (8, 16, 32, 64, 128)} <= sizes
