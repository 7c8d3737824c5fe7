"""An optimiser's state as named tensors and plain JSON, and back, bit for bit.

Names are those of the parameters, never positions, so a state cannot land on another parameter.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from dlmone_fast.errors import CheckpointError
from dlmone_fast.models.plainfiles import StrPath
from dlmone_fast.models.tensors import check_names

_INT64_MAX = 2**63 - 1
# Choices of implementation, which belong to the machine that runs and not to the state.
_LOCAL_OPTIONS = frozenset({"foreach", "fused", "capturable", "differentiable"})
# AdamW divides by 1 - beta**step, as little as 2^-53: the quotient must still be a float32.
_LARGEST_RATE = 1e6


def flatten_optimizer(
    optimizer: Optimizer, parameters: Mapping[str, Parameter]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return an optimiser's state as tensors and a JSON object.

    Args:
        optimizer: an optimiser whose state per parameter is tensors, such as AdamW.
        parameters: every parameter of the optimiser by name, e.g. dict(model.named_parameters()).

    Returns:
        tensors named "<parameter>/<key>" (detached, not copied), and {"class", "groups", "keys"}:
        hyper-parameters and parameter names of each group, state keys of each parameter.

    Raises:
        CheckpointError: a parameter has no name, or a state entry is not a tensor.
    """
    names = _names_by_id(parameters)
    groups = [
        {**_hyperparameters(group), "parameters": [_name(names, p) for p in group["params"]]}
        for group in optimizer.param_groups
    ]
    tensors: dict[str, Tensor] = {}
    keys: dict[str, list[str]] = {}
    for parameter, state in optimizer.state.items():
        name = _name(names, parameter)
        keys[name] = sorted(state)
        for key, value in state.items():
            if not isinstance(value, Tensor):
                raise CheckpointError(
                    f"optimizer: {name}/{key} is {type(value).__name__}; only optimisers whose "
                    "state is tensors can be saved"
                )
            tensors[f"{name}/{key}"] = value.detach()
    return tensors, {"class": type(optimizer).__name__, "groups": groups, "keys": keys}


def restore_optimizer(
    optimizer: Optimizer,
    parameters: Mapping[str, Parameter],
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    where: StrPath = "optimizer state",
) -> None:
    """Put AdamW's state from `flatten_optimizer` back, bit for bit, after checking that it fits.

    Nothing of the optimiser changes unless everything fits. foreach, fused, capturable and
    differentiable keep the live optimiser's values. `where` is the file, for messages.

    Raises:
        CheckpointError: another optimiser class, other groups or names, missing or unexpected
            tensors, a shape or dtype that is not the parameter's, or values that no AdamW has and
            that its step would fail on.
    """
    names = _names_by_id(parameters)
    _check_groups(optimizer, names, state, where)
    _check_keys(state, where)
    keys: Mapping[str, list[str]] = state["keys"]
    check_names(
        [f"{name}/{key}" for name, own in keys.items() for key in own],
        tensors,
        where,
        error=CheckpointError,
    )
    order = [p for group in optimizer.param_groups for p in group["params"]]
    restored: dict[int, dict[str, Tensor]] = {}
    for index, parameter in enumerate(order):
        name = _name(names, parameter)
        if name in keys:
            restored[index] = {
                key: _fitting(tensors[f"{name}/{key}"], parameter, f"{name}/{key}", where)
                for key in keys[name]
            }
    groups = optimizer.state_dict()["param_groups"]
    for live, saved in zip(groups, state["groups"], strict=True):
        live.update({key: _like(live.get(key), saved[key]) for key in saved if key != "parameters"})
    optimizer.load_state_dict({"state": restored, "param_groups": groups})


def _names_by_id(parameters: Mapping[str, Parameter]) -> dict[int, str]:
    return {id(parameter): name for name, parameter in parameters.items()}


def _name(names: Mapping[int, str], parameter: Tensor) -> str:
    if id(parameter) not in names:
        raise CheckpointError(
            f"optimizer: a parameter of shape {list(parameter.shape)} has no name; pass all of "
            "the module's named_parameters()"
        )
    return names[id(parameter)]


def _hyperparameters(group: Mapping[str, Any]) -> dict[str, Any]:
    """A group's options as JSON values; a learning rate held in a tensor becomes a number."""
    return {
        key: value.item() if isinstance(value, Tensor) else value
        for key, value in group.items()
        if key != "params" and key not in _LOCAL_OPTIONS
    }


def _like(live: Any, saved: Any) -> Any:
    """Give a value from JSON the type that the optimiser holds."""
    if isinstance(live, Tensor):
        return live.new_tensor(_like(live.item(), saved))
    if isinstance(saved, list):
        return tuple(map(_like, live, saved))
    # JSON may spell 1e300 as an integer, which no 64 bits hold.
    return float(saved) if type(live) is float else saved


def _check_groups(
    optimizer: Optimizer, names: Mapping[int, str], state: Mapping[str, Any], where: StrPath
) -> None:
    keys, groups = state.get("keys"), state.get("groups")
    if (
        not isinstance(groups, list)
        or not isinstance(keys, Mapping)
        or not all(isinstance(own, list) for own in keys.values())
    ):
        raise CheckpointError(
            f"{where}: must hold groups and a list of keys for each parameter; use another "
            "checkpoint"
        )
    if state.get("class") != type(optimizer).__name__:
        raise CheckpointError(
            f"{where}: is of {state.get('class')!r:.80}, this run uses "
            f"{type(optimizer).__name__}; resume with the configuration of the checkpoint"
        )
    if len(groups) != len(optimizer.param_groups):
        raise CheckpointError(
            f"{where}: has {len(groups)} parameter groups, this run has "
            f"{len(optimizer.param_groups)}; resume with the configuration of the checkpoint"
        )
    known: set[str] = set()
    for index, (live, saved) in enumerate(zip(optimizer.param_groups, groups, strict=True)):
        expected = [_name(names, p) for p in live["params"]]
        if not isinstance(saved, Mapping) or saved.get("parameters") != expected:
            raise CheckpointError(
                f"{where}: group {index} does not hold this run's parameters in this "
                f"run's order ({', '.join(expected[:3])}, …); resume with the configuration of "
                "the checkpoint"
            )
        options = set(_hyperparameters(live))
        if set(saved) - {"parameters"} != options:
            raise CheckpointError(
                f"{where}: group {index} must hold the options {sorted(options)}, found "
                f"{sorted(set(saved) - {'parameters'})}; it was written by another torch release"
            )
        for key, value in _hyperparameters(live).items():
            if not _same_kind(value, saved[key]):
                raise CheckpointError(
                    f"{where}: {key} of group {index} must be like {value!r}, got "
                    f"{saved[key]!r:.80}; use another checkpoint"
                )
            if not _within_bounds(key, saved[key]):
                raise CheckpointError(
                    f"{where}: {key} of group {index} must be {_bounds(key)}, got "
                    f"{saved[key]!r:.80}; use another checkpoint"
                )
        known.update(expected)
    unknown = sorted(set(keys) - known)
    if unknown:
        raise CheckpointError(
            f"{where}: {unknown[0]:.80} is not a parameter of this run; resume with the "
            "configuration of the checkpoint"
        )


def _same_kind(live: Any, saved: Any) -> bool:
    """Whether a value from JSON can stand for one of an optimiser's options."""
    if isinstance(live, (list, tuple)):
        return (
            isinstance(saved, (list, tuple))
            and len(saved) == len(live)
            and all(map(_same_kind, live, saved))
        )
    if type(live) in (int, float):
        most = sys.float_info.max if float in (type(live), type(saved)) else _INT64_MAX
        return type(saved) in (int, float) and abs(saved) <= most
    return type(saved) is type(live)


def _bounds(key: str) -> str:
    most = {"betas": "from 0 to below 1", "lr": f"between 0 and {_LARGEST_RATE:g}"}
    return most.get(key, "0 or more")


def _within_bounds(key: str, saved: Any) -> bool:
    """Whether a value of the right kind is one that AdamW's step can compute with."""
    if isinstance(saved, (list, tuple)):
        return all(_within_bounds(key, value) for value in saved)
    if key == "betas":
        return bool(0 <= saved < 1)
    return type(saved) not in (int, float) or 0 <= saved <= (
        _LARGEST_RATE if key == "lr" else sys.float_info.max
    )


def _check_keys(state: Mapping[str, Any], where: StrPath) -> None:
    """AdamW takes a parameter's state for whole as soon as there is any."""
    for group in state["groups"]:
        expected = ["exp_avg", "exp_avg_sq", "step"]
        if group.get("amsgrad"):
            expected.insert(2, "max_exp_avg_sq")
        for name in group["parameters"]:
            found = state["keys"].get(name, expected)
            if found != expected:
                raise CheckpointError(
                    f"{where}: the keys of {name} must be {', '.join(expected)}, got "
                    f"{found!r:.80}; use another checkpoint"
                )


def _fitting(tensor: Tensor, parameter: Parameter, name: str, where: StrPath) -> Tensor:
    # AdamW's step counter is the one scalar, float32; moments are like their parameter.
    scalar = name.endswith("/step")
    shape = () if scalar else tuple(parameter.shape)
    dtype = torch.float32 if scalar else parameter.dtype
    if tuple(tensor.shape) != shape or tensor.dtype != dtype:
        raise CheckpointError(
            f"{where}: {name} is {list(tensor.shape)} {tensor.dtype}, expected "
            f"{list(shape)} {dtype}; resume with the configuration of the checkpoint"
        )
    # Counts, and means of squares.
    if name.endswith(("/step", "_sq")) and not bool((tensor >= 0).all()):
        raise CheckpointError(f"{where}: {name} must be 0 or more; use another checkpoint")
    return tensor
