from __future__ import annotations

import subprocess
import sys

import pytest

from dlmone_fast.errors import BackendUnavailableError, UsageError
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
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, f"noise=x, {OP} = plain")
    assert chosen(1) == "plain"
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, "noise=plain")
    assert chosen(1) == "picky"
    with dispatch.force_backend("plain", op="noise"):
        assert chosen(1) == "picky"
    with dispatch.force_backend("plain", op=OP):
        assert chosen(1) == "plain"


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("", ("auto", "auto", "auto")),
        (" torch ,", ("torch", "torch", "torch")),
        ("nearest_token=cpp", ("cpp", "cpp", "auto")),
        ("nearest_token_with_margin=cpp", ("auto", "cpp", "auto")),
        ("nearest_token_with_margin=torch,nearest_token=cpp", ("cpp", "torch", "auto")),
        ("blocks=triton", ("auto", "auto", "triton")),
        ("torch,nearest_token=cpp,bias_gelu=auto", ("cpp", "cpp", "auto")),
        ("nearest_token=cpp,torch", ("cpp", "cpp", "torch")),
    ],
)
def test_a_file_names_its_operations_and_the_closest_entry_counts(
    value: str, expected: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, value)
    ops = ("nearest_token", "nearest_token_with_margin", "bias_gelu")
    assert tuple(map(dispatch.requested, ops)) == expected


def test_force_backend_takes_the_name_of_a_file():
    with dispatch.force_backend("torch", op="blocks"):
        assert dispatch.requested("bias_tanh") == "torch"
        assert dispatch.requested("noise") == "auto"


@pytest.mark.parametrize("name", ["nearest_tokn", "", "forward_diffusion_backward"])
def test_misspelt_operations_are_refused(name: str, monkeypatch: pytest.MonkeyPatch):
    message = rf"no operation '{name}'; known are .*nearest_token, nearest_token_with_margin"
    with (
        pytest.raises(UsageError, match=f"force_backend: .*{message}"),
        dispatch.force_backend("torch", op=name),
    ):
        pass
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, f"{name}=torch")
    for _ in range(2):
        with pytest.raises(UsageError, match=f"DLMONE_KERNEL_BACKEND: .*{message}"):
            chosen(1)
    # Also by an operation that is not the one misspelt.
    with pytest.raises(UsageError, match=message):
        dispatch.requested("noise")


@pytest.mark.parametrize("value", ["cpp,torch", "noise=cpp,noise=torch", "noise="])
def test_values_without_a_meaning_are_refused(value: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(dispatch.ENVIRONMENT_VARIABLE, value)
    with pytest.raises(UsageError, match=f"expected a backend .* got '{value}'"):
        chosen(1)


def test_the_list_of_operations_is_that_of_the_modules():
    code = (
        "import importlib\n"
        "from dlmone_fast.kernels import dispatch\n"
        "for name in dispatch.OPERATIONS:\n"
        "    importlib.import_module(f'dlmone_fast.kernels.{name}')\n"
        "listed = [op for ops in dispatch.OPERATIONS.values() for op in ops]\n"
        "assert sorted([*listed, *dispatch.BACKWARD]) == sorted(dispatch.operations())\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


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
