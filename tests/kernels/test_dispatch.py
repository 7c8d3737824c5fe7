from __future__ import annotations

import pytest

from dlmone_fast.errors import BackendUnavailableError
from dlmone_fast.kernels import dispatch

OP = "an_operation_of_the_tests"


@pytest.fixture(autouse=True)
def operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(dispatch.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(dispatch, "_BACKENDS", {})
    dispatch.register(
        OP,
        dispatch.Backend("picky", lambda x: None if x > 0 else "x is not positive", lambda x: x),
        dispatch.Backend("plain", lambda x: None, lambda x: x),
    )


def chosen(x: int, **request: str) -> str:
    return dispatch.select(OP, x, **request).name


def test_auto_takes_the_first_usable_backend():
    assert chosen(1) == "picky"
    assert chosen(0) == "plain"


def test_argument_beats_context_beats_environment(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "plain")
    assert chosen(1) == "plain"
    with dispatch.force_backend("picky"):
        assert chosen(1) == "picky"
        assert chosen(1, kernel_backend="plain") == "plain"
    assert chosen(1) == "plain"


def test_requests_can_name_one_operation(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, f"another=x, {OP}=plain")
    assert chosen(1) == "plain"
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "another=plain")
    assert chosen(1) == "picky"
    with dispatch.force_backend("plain", op="another"):
        assert chosen(1) == "picky"


def test_auto_lifts_an_outer_request():
    with dispatch.force_backend("plain"), dispatch.force_backend("auto"):
        assert chosen(1) == "picky"


def test_a_forced_backend_that_cannot_run_is_refused_with_reason_and_alternatives():
    with pytest.raises(BackendUnavailableError, match=r"x is not positive.*Available here: plain"):
        chosen(0, kernel_backend="picky")


def test_an_unknown_backend_is_refused_with_alternatives():
    with pytest.raises(BackendUnavailableError, match=r"'cuda'.*Available here: picky, plain"):
        chosen(1, kernel_backend="cuda")


def test_auto_without_a_usable_backend_lists_the_reasons():
    dispatch.register("hopeless", dispatch.Backend("one", lambda x: "no luck", lambda x: x))
    with pytest.raises(BackendUnavailableError, match="one: no luck"):
        dispatch.select("hopeless", 1)
