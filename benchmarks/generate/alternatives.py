"""Autoregressive competitors of one step, by device and name.

They write an answer token by token. All have the layers, width, heads and vocabulary of the case's
model, random weights, the same tokenizer and the same prompts, and write exactly `NEW_TOKENS`
tokens, greedily.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from benchmarks.generate.autoregressive import (
    NEW_TOKENS,
    POSITIONS,
    WEIGHT_STD,
    CachedGreedy,
    Decoder,
    Ids,
    complaint,
    padded,
    same_choices,
    without,
)
from benchmarks.generate.cases import Model, prompts
from benchmarks.generate.ctranslate2_model import EncoderDecoder, Translator, export
from benchmarks.generate.peers import Output, why_absent
from benchmarks.harness.records import Row
from benchmarks.harness.timing import Call, held_memory

DECODER = "PyTorch decoder, KV cache"
GPT2 = "transformers GPT-2, KV cache"
CTRANSLATE2 = "CTranslate2 encoder-decoder"

LONG = "compiling takes a minute: timed with --full only"

# In deviations of a position's scores, where a token at random is about four below the best:
# fp32 for other orders of summation, the rest for rounded weights.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.1, torch.bfloat16: 0.5, torch.int8: 1.0}


class Generation(Protocol):
    """Prompts' ids to answers' ids, and the scores of a plain pass in fp32 for each choice."""

    @property
    def network(self) -> nn.Module:
        """The weights, in PyTorch."""
        ...

    def __call__(self, prompts: Ids) -> list[list[int]]: ...

    def exact(self, prompts: Ids, answers: Ids) -> Tensor:
        """fp32 scores [B, NEW_TOKENS, V] of each next token, without a cache."""
        ...


@dataclass(frozen=True, eq=False)
class Setting:
    """A case's model and a folder for files, which competitors are made from.

    The networks are made once and shared by those that run them.
    """

    model: Model
    folder: Path

    @functools.cached_property
    def decoder(self) -> Decoder:
        return Decoder(self.model.denoiser.config).to(self.model.device)

    @functools.cached_property
    def encoder_decoder(self) -> EncoderDecoder:
        return EncoderDecoder(self.model.denoiser.config).to(self.model.device)

    @functools.cached_property
    def exported(self) -> Path:
        return export(self.encoder_decoder, self.model.tokenizer, self.folder)


Make = Callable[[Setting], Generation]


@dataclass(frozen=True)
class Alternative:
    """One competitor.

    Attributes:
        make: its generation.
        dtype: of its weights.
        packages: what must be importable besides torch.
        long: only for runs with --full.
        note: what else to know of its times.
    """

    make: Make
    dtype: torch.dtype = torch.float32
    packages: tuple[str, ...] = ()
    long: bool = False
    note: str = ""


class HuggingFace:
    """transformers' GPT-2 with random weights, by `generate` as its users call it."""

    def __init__(self, model: Model) -> None:
        from transformers import GPT2Config, GPT2LMHeadModel

        config, self.tokenizer = model.denoiser.config, model.tokenizer
        sizes = GPT2Config(
            vocab_size=config.vocab_size, n_positions=POSITIONS, n_embd=config.hidden_size,
            n_layer=config.num_layers, n_head=config.num_heads, n_inner=config.ffn_size,
            initializer_range=WEIGHT_STD, bos_token_id=self.tokenizer.cls_id,
            eos_token_id=self.tokenizer.sep_id, pad_token_id=self.tokenizer.pad_id,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.network: Any = GPT2LMHeadModel(sizes).eval().requires_grad_(False)
        self.network = self.network.to(model.device)

    def __call__(self, prompts: Ids, **settings: Any) -> list[list[int]]:
        """The answers' ids; `settings` are further ones of `generate`."""
        given = padded(prompts, self.tokenizer.pad_id, self.network.device)
        found = self.network.generate(
            given.ids, attention_mask=self._mask(prompts, given.ids.shape[1]), do_sample=False,
            min_new_tokens=NEW_TOKENS, max_new_tokens=NEW_TOKENS, **settings,
        )  # fmt: skip
        answers: list[list[int]] = found[:, given.ids.shape[1] :].tolist()
        return answers

    @torch.inference_mode()
    def exact(self, prompts: Ids, answers: Ids) -> Tensor:
        """fp32 scores [B, NEW_TOKENS, V] of each next token, in one pass without a cache."""
        given = padded(prompts, self.tokenizer.pad_id, self.network.device)
        width = given.ids.shape[1]
        ids = torch.cat([given.ids, torch.tensor(answers).to(given.ids)], 1)
        found = self.network(
            ids, attention_mask=self._mask(prompts, ids.shape[1]), position_ids=given.places,
            use_cache=False,
        )  # fmt: skip
        return without(self.tokenizer.sep_id, found.logits[:, width - 1 : -1])

    def _mask(self, prompts: Ids, width: int) -> Tensor:
        longest = max(map(len, prompts))
        padding = torch.tensor([longest - len(ids) for ids in prompts])
        return (torch.arange(width) >= padding[:, None]).long().to(self.network.device)


def _decoder(
    dtype: torch.dtype, compile_mode: str | None = None
) -> Callable[[Setting], Generation]:
    def make(setting: Setting) -> Generation:
        exact = setting.decoder
        mine = exact
        if dtype != torch.float32:
            mine = Decoder(exact.config).to(exact.embedding.weight.device, dtype)
        return CachedGreedy(mine, setting.model.tokenizer, exact, compile_mode)

    return make


def _gpt2(setting: Setting) -> Generation:
    return HuggingFace(setting.model)


def _ctranslate2(compute_type: str) -> Make:
    return lambda setting: Translator(
        setting.encoder_decoder, setting.model.tokenizer, setting.exported, compute_type,
        setting.model.device,
    )  # fmt: skip


_FP32, _BF16, _INT8 = torch.float32, torch.bfloat16, torch.int8
_HALVES = "half of the layers encode, half decode and look at the encoded prompt too"

ALTERNATIVES: dict[str, dict[str, Alternative]] = {
    "cpu": {
        f"{DECODER} fp32": Alternative(_decoder(_FP32)),
        f"{DECODER} bf16": Alternative(_decoder(_BF16), _BF16),
        f"{DECODER} fp32, compiled": Alternative(_decoder(_FP32, "default"), long=True),
        f"{GPT2} fp32": Alternative(_gpt2, packages=("transformers",)),
        f"{CTRANSLATE2} fp32": Alternative(
            _ctranslate2("float32"), packages=("ctranslate2",), note=_HALVES
        ),
        f"{CTRANSLATE2} int8": Alternative(
            _ctranslate2("int8"), _INT8, packages=("ctranslate2",), note=_HALVES
        ),
    },
    "cuda": {
        f"{DECODER} fp32": Alternative(_decoder(_FP32)),
        f"{DECODER} bf16": Alternative(_decoder(_BF16), _BF16),
        f"{DECODER} bf16, compiled": Alternative(_decoder(_BF16, "reduce-overhead"), _BF16),
        f"{GPT2} fp32": Alternative(_gpt2, packages=("transformers",)),
        f"{CTRANSLATE2} fp32": Alternative(
            _ctranslate2("float32"), packages=("ctranslate2",), note=_HALVES
        ),
        f"{CTRANSLATE2} fp16": Alternative(
            _ctranslate2("float16"), torch.float16, packages=("ctranslate2",), note=_HALVES
        ),
        f"{CTRANSLATE2} int8": Alternative(
            _ctranslate2("int8"), _INT8, packages=("ctranslate2",), note=_HALVES
        ),
    },
}
"""Competitors of one step, by device and by name in the report."""


@dataclass(frozen=True)
class TextCall:
    """Text in, text out, around a generation."""

    model: Model
    generation: Generation

    def __call__(self, batch: Sequence[str]) -> Output:
        tokenizer = self.model.tokenizer
        answers = self.generation(tokenizer.encode(batch))
        return Output([tokenizer.decode_clean(ids) for ids in answers], answers)


def line_up(
    setting: Setting, batch: int, full: bool
) -> tuple[dict[str, Call], dict[str, dict[str, Any]]]:
    """The competitors that run here and answer right, and further fields of all their rows.

    Args:
        batch: of how many prompts a call is.
        full: also those that take long to make.
    """
    calls: dict[str, Call] = {}
    fields: dict[str, dict[str, Any]] = {}
    device = setting.model.device
    for name, alternative in ALTERNATIVES[device.type].items():
        known = fields[name] = {"dtype": str(alternative.dtype).removeprefix("torch.")}
        absent = why_absent(device, alternative.dtype, alternative.packages)
        if alternative.long and not full:
            absent = absent or LONG
        if absent:
            known["note"] = f"absent: {absent}"
            continue
        try:
            call = TextCall(setting.model, alternative.make(setting))
            wrong = _check(call, batch, alternative, known)
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            wrong = f"failed: {type(error).__name__}: {first}"[:160]
        if wrong:
            known["note"] = wrong
        else:
            calls[name] = functools.partial(call, prompts(batch))
    return calls, fields


def _check(call: TextCall, batch: int, alternative: Alternative, known: dict[str, Any]) -> str:
    """Fill `known` with facts, or say what is wrong; "": nothing."""
    texts, generation = prompts(batch), call.generation
    # The first call: graphs are recorded in it, and its memory with them.
    found, known["held_bytes"] = held_memory(lambda: call(texts), call.model.device)
    exact = generation.exact(call.model.tokenizer.encode(texts), found.token_ids)
    wrong = complaint(found.token_ids, exact, _TOLERANCE[alternative.dtype])
    if not wrong and call(texts) != found:
        wrong = "a second call answers differently"
    if wrong:
        return f"wrong, so not timed: {wrong}"
    parameters = sum(parameter.numel() for parameter in generation.network.parameters())
    facts = [
        f"{parameters / 1e6:.1f} M parameters",
        f"{same_choices(found.token_ids, exact):.1%} of the tokens are fp32's choice",
        alternative.note,
    ]
    known["note"] = "; ".join(filter(None, facts))
    return ""


def comparable(row: Row, device: torch.device) -> Row:
    """The row without figures that follow from our own work, or GPU memory that torch misses."""
    if row.ours:
        return row
    unseen = device.type == "cuda" and row.implementation.startswith(CTRANSLATE2)
    return replace(
        row,
        gigabytes_per_second=None,
        teraflops=None,
        fraction_of_floor=None,
        floor_ms=None,
        peak_bytes=None if unseen else row.peak_bytes,
        held_bytes=None if unseen else row.held_bytes,
    )
