"""An optimiser continues from its stored state bit for bit, or says why it cannot."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from dlmone_fast.errors import CheckpointError
from dlmone_fast.models.checkpoint import load_checkpoint, save_checkpoint
from dlmone_fast.models.optimizer_state import flatten_optimizer, restore_optimizer


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def adamw(net: nn.Module, **options: Any) -> torch.optim.AdamW:
    weights = [p for n, p in net.named_parameters() if n.endswith("weight")]
    biases = [p for n, p in net.named_parameters() if n.endswith("bias")]
    groups = [{"params": weights, "weight_decay": 0.1}, {"params": biases, "lr": 3e-4}]
    return torch.optim.AdamW(groups, lr=1e-3, betas=(0.0, 0.999), **options)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        data = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        net(data).square().mean().backward()
        for group in optimizer.param_groups:
            group["lr"] *= 0.9
        optimizer.step()


def named(net: nn.Module) -> Mapping[str, Parameter]:
    return dict(net.named_parameters())


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"foreach": True}])
def test_training_continues_bit_for_bit_through_a_checkpoint(
    tmp_path: Path, options: dict[str, Any]
) -> None:
    whole = network()
    optimizer = adamw(whole, **options)
    train(whole, optimizer, range(5))
    tensors, state = flatten_optimizer(optimizer, named(whole))
    saved = {"model": whole.state_dict(), "optimizer": tensors}
    path = save_checkpoint(tmp_path, 5, saved, {"optimizer": state}, "")
    train(whole, optimizer, range(5, 10))

    loaded = load_checkpoint(path)
    resumed = network()
    resumed.load_state_dict(loaded.tensors["model"])
    fresh = adamw(resumed, **options)
    restore_optimizer(fresh, named(resumed), loaded.tensors["optimizer"], loaded.state["optimizer"])
    train(resumed, fresh, range(5, 10))
    for (name, one), other in zip(whole.named_parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert [g["lr"] for g in optimizer.param_groups] == [g["lr"] for g in fresh.param_groups]
    assert [g["betas"] for g in fresh.param_groups] == [(0.0, 0.999)] * 2


def test_a_fresh_optimiser_round_trips(tmp_path: Path) -> None:
    net = network()
    tensors, state = flatten_optimizer(adamw(net), named(net))
    assert tensors == {}
    restore_optimizer(adamw(net), named(net), tensors, json.loads(json.dumps(state)))


def stored() -> tuple[dict[str, Tensor], dict[str, Any]]:
    net = network()
    optimizer = adamw(net)
    train(net, optimizer, range(2))
    tensors, state = flatten_optimizer(optimizer, named(net))
    return tensors, json.loads(json.dumps(state))


def drop_moment(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    del tensors["0.weight/exp_avg"]


def add_moment(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    tensors["9.weight/exp_avg"] = torch.zeros(1)


def misshape(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    tensors["2.weight/exp_avg_sq"] = torch.zeros(8, 2)


def retype(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    tensors["2.weight/exp_avg_sq"] = tensors["2.weight/exp_avg_sq"].double()


def halve_counter(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    # It would stop counting at 2048.
    tensors["2.bias/step"] = tensors["2.bias/step"].half()


def rename_class(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    state["class"] = "SGD"


def reorder(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    state["groups"][0]["parameters"].reverse()


def drop_group(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    state["groups"].pop()


def drop_option(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    del state["groups"][0]["weight_decay"]


def set_option(name: str, value: Any) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, state: state["groups"][0].update({name: value})


def one_key(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    state["keys"]["0.weight"] = 3


def all_keys(change: Callable[[list[Any]], Any]) -> Any:
    def apply(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        change(state["keys"]["2.bias"])

    return apply


def without_state(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Half of a parameter's state, in both parts alike."""
    state["keys"]["0.weight"].remove("exp_avg_sq")
    del tensors["0.weight/exp_avg_sq"]


def fill(name: str, value: float) -> Callable[[dict[str, Tensor], dict[str, Any]], None]:
    return lambda tensors, state: tensors.update({name: torch.full_like(tensors[name], value)})


def empty(tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
    state.clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (drop_moment, r"missing: 0\.weight/exp_avg"),
        (add_moment, r"unexpected: 9\.weight/exp_avg"),
        (misshape, r"2\.weight/exp_avg_sq is \[8, 2\]"),
        (retype, r"2\.weight/exp_avg_sq is .*float64"),
        (halve_counter, r"2\.bias/step is \[\] torch\.float16, expected \[\] torch\.float32"),
        (rename_class, "'SGD'"),
        (reorder, "group 0"),
        (drop_group, "1 parameter groups"),
        (drop_option, "weight_decay"),
        (set_option("lr", "high"), "lr of group 0 must be like .*, got 'high'"),
        (set_option("betas", [0.9]), r"betas of group 0 must be like \(0\.\d+, .*got \[0\.9\]"),
        (set_option("eps", 10**400), "eps of group 0 must be like"),
        (set_option("maximize", 0), "maximize of group 0 must be like False, got 0"),
        (set_option("lr", -0.1), "lr of group 0 must be between 0 and 1e.06, got -0.1"),
        (set_option("lr", 1e39), r"lr of group 0 must be between 0 and 1e.06, got 1e\+39"),
        (set_option("weight_decay", -1), "weight_decay of group 0 must be 0 or more, got -1"),
        (set_option("betas", [1.0, 0.9]), "betas of group 0 must be from 0 to below 1"),
        (set_option("betas", [0.9, -0.1]), "betas of group 0 must be from 0 to below 1"),
        (set_option("amsgrad", True), r"keys of 0\.weight must be .*, max_exp_avg_sq, step, got"),
        (without_state, r"keys of 0\.weight must be exp_avg, exp_avg_sq, step, got"),
        (all_keys(list.clear), r"keys of 2\.bias must be .*, got \[\]"),
        (all_keys(lambda keys: keys.append([])), r"keys of 2\.bias must be"),
        (all_keys(lambda keys: keys.append("step")), r"keys of 2\.bias must be"),
        (fill("2.bias/step", -1.0), r"2\.bias/step must be 0 or more"),
        (fill("2.bias/exp_avg_sq", -1.0), r"2\.bias/exp_avg_sq must be 0 or more"),
        (one_key, "a list of keys for each parameter"),
        (empty, "must hold groups and a list of keys"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change: Any, message: str) -> None:
    tensors, state = stored()
    change(tensors, state)
    net = network()
    optimizer = adamw(net)
    train(net, optimizer, range(1))
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(CheckpointError, match=message):
        restore_optimizer(optimizer, named(net), tensors, state)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, values in before["state"].items():
        assert all(torch.equal(after["state"][index][key], values[key]) for key in values)


def test_a_parameter_without_a_name_is_refused() -> None:
    net = network()
    with pytest.raises(CheckpointError, match="has no name"):
        flatten_optimizer(adamw(net), {"0.weight": named(net)["0.weight"]})


def test_a_number_that_is_spelled_as_an_integer_is_one_that_the_optimiser_can_use() -> None:
    tensors, state = stored()
    state["groups"][0].update(eps=10**300, betas=[0, 1 - 2**-10])
    net = network()
    optimizer = adamw(net)
    restore_optimizer(optimizer, named(net), tensors, state)
    train(net, optimizer, range(1))
    group = optimizer.param_groups[0]
    assert (group["eps"], group["betas"]) == (1e300, (0.0, 1 - 2**-10))
    assert type(group["eps"]) is type(group["betas"][0]) is float
