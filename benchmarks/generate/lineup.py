"""The implementations of one case, checked against fp32 on the same noise and ready to time."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import pytest
import torch
from torch import Tensor

from benchmarks.generate import cases
from benchmarks.generate import targets as names
from benchmarks.generate.cases import Inputs, Model
from benchmarks.generate.ours import Own, phases
from benchmarks.generate.peers import Peer, PlainCall
from benchmarks.harness.timing import Call, held_memory
from dlmone_fast.errors import BackendUnavailableError
from dlmone_fast.kernels.nearest_token import nearest_token, nearest_token_with_margin
from dlmone_fast.runtime.ties import clear_margin

# Below this a lower precision does not compute what fp32 does, even on a random network.
_LEAST_AGREEMENT = 0.5

Ids = Sequence[Sequence[int]]


class Gate(Protocol):
    """A check that a lower precision must pass before it is timed."""

    def agreement(self, contender: Own | Peer) -> float | None:
        """The share of a trained model's tokens that are fp32's."""

    def complaint(self, contender: Own | Peer) -> str:
        """The reason not to time the implementation; "": there is none."""


@dataclass
class Lineup:
    """The implementations of a case that answer right, and the fields of all of them.

    Attributes:
        model, batch: the case.
        gate: what lower precisions must pass on a trained model; None: nothing.
        gated: whether a wrong implementation is left out.
        calls: what to time, by name.
        fields: further fields of the rows, by name.
    """

    model: Model
    batch: int
    gate: Gate | None = None
    gated: bool = True
    calls: dict[str, Call] = field(default_factory=dict)
    fields: dict[str, dict[str, Any]] = field(default_factory=dict)
    _networks: dict[str, Call] = field(default_factory=dict)

    @functools.cached_property
    def given(self) -> Inputs:
        """The network's inputs."""
        return cases.inputs(self.model, self.batch)

    @functools.cached_property
    def exact(self) -> Tensor:
        """x̂0 [B, L, d] of the networks in PyTorch and fp32."""
        with torch.inference_mode():
            found: Tensor = self.model.denoiser(self.given.x_t, self.given.t)
            return found

    @functools.cached_property
    def answers(self) -> Ids:
        """The target ids that follow from `exact`."""
        return self._rounded(self.exact)

    def add(self, contender: Own | Peer, parts: bool = True) -> bool:
        """Check an implementation and take it in, with its network; False if it cannot run."""
        name, batch = contender.name, self.model.texts(self.batch)
        self.fields[name] = {"dtype": names.precision_of(name)}
        absent = contender.absent
        if self.gated and self.batch not in (contender.batches or (self.batch,)):
            absent = f"timed at batch {' and '.join(map(str, contender.batches))} only"
        if absent:
            self.fields[name]["note"] = f"absent: {absent}"
            return False
        try:
            if self.gate is not None:
                self.fields[name]["trained_agreement"] = self.gate.agreement(contender)
                if complaint := self.gate.complaint(contender):
                    self.fields[name]["note"] = complaint
                    return False
            if isinstance(contender, Own):
                return self._add(name, *_own_calls(contender, batch, self.given), parts)
            return self._add(name, *self._peer_calls(contender, batch), parts)
        except BackendUnavailableError as error:
            reason = f"absent: {error}"
        except Exception as error:
            if isinstance(contender, Own):
                raise
            first = (str(error).strip().splitlines() or [""])[0]
            reason = f"failed: {type(error).__name__}: {first}"
        self.fields[name]["note"] = reason[:160]
        return False

    def add_phases(self) -> None:
        """The parts of our first call besides the network; before them every network alone."""
        self.calls |= self._networks
        found = phases(self.model, self.given, self.exact, self.answers)
        for part, call in found.items():
            call()
            name = f"dlmone_fast, {part}"
            self.calls[name], self.fields[name] = call, {"part": part}

    def _add(self, name: str, call: Call, ids: Call, network: Call, parts: bool) -> bool:
        known = self.fields[name]
        # The first call: graphs are recorded in it, and its memory with them.
        result, known["held_bytes"] = held_memory(ids, self.model.device)
        known["agreement"] = self._agreement(result)
        if self.gated and (wrong := self._complaint(name, known["agreement"], result)):
            known["note"] = f"wrong, so not timed: {wrong}"
            if name.startswith("dlmone_fast"):
                pytest.fail(f"{name}: {wrong}")
            return False
        self.calls[name] = call
        if parts:
            alone, x0 = names.network(name), network()
            error = (x0.float() - self.exact).square().mean().sqrt()
            self.fields[alone] = {
                "part": "network",
                "agreement": self._agreement(self._rounded(x0)),
                "error": float(error / self.exact.square().mean().sqrt()),
            }
            self._networks[alone] = network
        return True

    def _peer_calls(self, peer: Peer, batch: list[str]) -> tuple[Call, Call, Call]:
        plain, given = PlainCall(self.model, peer), self.given
        time = self.model.denoiser.schedule.network_time(given.t)

        def network() -> Tensor:
            with torch.inference_mode():
                return peer.network(given.x_t, time)

        return (
            lambda: plain(batch),
            lambda: plain(batch, given.noise).token_ids,
            network,
        )

    def _rounded(self, x0: Tensor) -> Ids:
        found = nearest_token(x0.float(), self.model.vocabulary).cpu()
        return [ids[kept != 0].tolist() for ids, kept in zip(found, self.given.mask, strict=True)]

    def _complaint(self, name: str, agreed: float, found: Ids) -> str:
        if names.precision_of(name) == "fp32":
            wrong = self._clear_differences(found)
            return f"{wrong} ids differ from fp32's, near ties aside" if wrong else ""
        if agreed < _LEAST_AGREEMENT:
            return f"{agreed:.2%} of the tokens are fp32's"
        return ""

    def _clear_differences(self, found: Ids) -> int:
        """Ids unlike fp32's where the choice was not between almost equally near embeddings."""
        vocabulary, target = self.model.vocabulary, self.given.mask != 0
        _, margins = nearest_token_with_margin(self.exact, vocabulary)
        clear = margins.cpu() > clear_margin(vocabulary.table)
        return sum(
            a != b and bool(sure)
            for ids, expected, kept, sures in zip(found, self.answers, target, clear, strict=True)
            for a, b, sure in zip(ids, expected, sures[kept].tolist(), strict=True)
        )

    def _agreement(self, found: Ids) -> float:
        return agreement(found, self.answers, self.model.tokenizer.sep_id)


def agreement(found: Ids, expected: Ids, end: int) -> float:
    """The share of equal ids up to each expected answer's end, which counts: text stops there."""
    equal = total = 0
    for row, exact in zip(found, expected, strict=True):
        length = exact.index(end) + 1 if end in exact else len(exact)
        equal += sum(a == b for a, b in zip(row[:length], exact[:length], strict=True))
        total += length
    return equal / total


def _own_calls(own: Own, batch: list[str], given: Inputs) -> tuple[Call, Call, Call]:
    def ids() -> Ids:
        return own(batch).token_ids

    network: Callable[[], Tensor] = lambda: own.network(given.x_t, given.t)  # noqa: E731
    return (lambda: own(batch)), ids, network
