"""The models, prompts and sizes that whole calls of `generate` are timed on.

Models are random, a function of a seed, except for their last layer: it is fitted so that outputs
lie near embeddings, as a trained model's do. Rounding then finds clear choices and the text ends,
as in use; with random outputs near ties would be the rule. Such a model is no measure of quality:
every prompt gets nearly the same answer.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from benchmarks.harness.floors import Work
from benchmarks.kernels.shapes import VOCABULARY
from dlmone_fast.config import DiffusionConfig, ModelConfig
from dlmone_fast.config.presets import PRESETS
from dlmone_fast.config.room import largest_source
from dlmone_fast.data.batches import source_batch
from dlmone_fast.diffusion import Schedule
from dlmone_fast.kernels.forward_diffusion import diffuse_of_draws
from dlmone_fast.kernels.nearest_token import Vocabulary
from dlmone_fast.kernels.noise import Stream, draws_of, normal_of_draws
from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.networks import DiffusionLM
from dlmone_fast.runtime import GenerationSettings
from dlmone_fast.text_tokenizer import SPECIAL_TOKENS, TextTokenizer
from dlmone_fast.tokenizer import Tokenizer

BERT_BASE = ModelConfig(vocab_size=VOCABULARY, normalize_embedding=True)
"""DiffuSeq's shape, 12 layers of width 768 over 128 positions; rows of E of equal norm."""

_SMALL = PRESETS["qqp-small"]
# Lengths are varied, which positions kept for the source would not let.
COMPACT = replace(_SMALL.model, vocab_size=_SMALL.data.vocab_size, source_positions=0)

TUNED_BATCHES = (1, 512)
"""Where torch.compile is timed on a GPU: tuning takes minutes for each of them."""

_LAST_WORD = 40
_FITTED_ROWS, _RIDGE = 8, 1e-3
_HEADS = ("how do i", "why should we", "what is the best way to", "how can you")
_VERBS = ("find", "learn about", "sell", "repair", "describe", "compare", "keep")
_ADJECTIVES = ("new", "small", "old", "good", "strange")
_NOUNS = ("house", "guitar", "language", "garden", "machine", "story", "phone", "bridge", "book")
_PLACES = ("at home", "in winter", "on monday", "online")


@dataclass(frozen=True)
class Case:
    """One call: `batch` prompts to a model; `full`: timed under --full only, for it takes long."""

    model: str
    config: ModelConfig
    batch: int
    full: bool = False

    def __str__(self) -> str:
        return f"{self.model}, batch {self.batch}"


@dataclass(frozen=True)
class Point:
    """A place of a plot: a case at `value` of what is varied, its `axis`.

    Attributes:
        candidates: the rows of the batch are candidates of one prompt, of which one is chosen.
        threads: so many CPU threads; None: as many as there are.
    """

    axis: str
    value: int
    case: Case
    candidates: bool = False
    threads: int | None = None

    def __str__(self) -> str:
        return f"{self.case.model}, {self.axis} {self.value}"


def _cases(model: str, config: ModelConfig, *batches: int) -> list[Case]:
    return [Case(model, config, batch) for batch in batches]


CASES = {
    "cpu": [
        Case("BERT-base", BERT_BASE, 1),
        Case("BERT-base", BERT_BASE, 8, full=True),
        *_cases("compact", COMPACT, 1, 8),
    ],
    "cuda": _cases("BERT-base", BERT_BASE, 1, 8, 32, 128, 512) + _cases("compact", COMPACT, 1, 8),
}


def _of_length(length: int) -> Point:
    config = replace(COMPACT, seq_len=length, max_positions=length)
    return Point("length", length, Case("compact", config, 1))


def _of_vocabulary(words: int) -> Point:
    config = replace(COMPACT, vocab_size=words)
    return Point("vocabulary", words, Case("compact", config, 1))


def _of_candidates(count: int) -> Point:
    return Point("candidates", count, Case("compact", COMPACT, count), candidates=True)


def _of_threads(number: int) -> Point:
    return Point("threads", number, Case("compact", COMPACT, 8), threads=number)


def threads_up_to(cores: int) -> list[int]:
    """Powers of two, and all cores."""
    return sorted({2**i for i in range(cores.bit_length()) if 2**i <= cores} | {cores})


_OF_NETWORK = [
    *(_of_length(n) for n in (16, 64, 128, 256, 512)),
    *(_of_vocabulary(n) for n in (2_000, 8_000, VOCABULARY, 120_000)),
    *(_of_candidates(n) for n in (1, 2, 4, 8, 16)),
]
POINTS = {
    "cpu": [
        *(Point("batch", c.batch, c) for c in _cases("compact", COMPACT, 1, 2, 4, 16, 64)),
        *_OF_NETWORK,
        *(_of_threads(n) for n in threads_up_to(os.cpu_count() or 1)),
    ],
    # A GPU has no choice of threads.
    "cuda": [
        *(
            Point("batch", c.batch, c)
            for c in _cases("BERT-base", BERT_BASE, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512)
        ),
        *_OF_NETWORK,
    ],
}


def prompts(count: int) -> list[str]:
    """Questions of seven to fifteen words."""
    texts = []
    for i in range(count):
        noun, other = _NOUNS[i % 9], _NOUNS[(i // 9 + 4) % 9]
        ending = f"the {_ADJECTIVES[i % 5]} {noun} or the {other}" if i % 2 else f"a {noun}"
        texts.append(f"{_HEADS[i % 4]} {_VERBS[i % 7]} {ending} {_PLACES[i // 3 % 4]}?")
    return texts


def _few_prompts() -> list[str]:
    return prompts(2)


@dataclass(frozen=True, eq=False)
class Model:
    """A model in memory, on its device.

    Attributes:
        texts: so many prompts for it.
        calibration: prompts that int8 is calibrated on. They are few for random models: the time
            of a call does not depend on them, and each of them costs many calls.
    """

    denoiser: Denoiser
    tokenizer: TextTokenizer
    settings: GenerationSettings
    vocabulary: Vocabulary
    texts: Callable[[int], list[str]] = prompts
    calibration: Callable[[], list[str]] = _few_prompts

    @property
    def device(self) -> torch.device:
        return self.vocabulary.table.device


@dataclass(frozen=True)
class Inputs:
    """A call's network inputs, x_t [B, L, d], and everything around them.

    Attributes:
        ids, mask: int64 [B, L], on the CPU; the mask is 0 on source positions.
        draws: int64 [B, 4], what the noise depends on.
        noise: the normals [B, L, d].
        t: timesteps int64 [B].
    """

    ids: Tensor
    mask: Tensor
    draws: Tensor
    noise: Tensor
    x_t: Tensor
    t: Tensor


@functools.lru_cache(maxsize=2)
def model(config: ModelConfig, device: torch.device, seed: int = 0) -> Model:
    """The model of these sizes; the last two are kept."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        lm = DiffusionLM(config)
    denoiser = Denoiser(lm, Schedule(DiffusionConfig())).eval().requires_grad_(False)
    limit = largest_source(config.seq_len, config.source_positions)
    settings = GenerationSettings(max_source_tokens=limit)
    found = Model(denoiser, tokenizer(config.vocab_size), settings, Vocabulary(denoiser.embedding))
    _fit_last_layer(found)
    if device.type == "cpu":
        return found
    denoiser = denoiser.to(device)
    return replace(found, denoiser=denoiser, vocabulary=Vocabulary(denoiser.embedding))


def tokenizer(vocab_size: int) -> Tokenizer:
    """A vocabulary with the words of `prompts`; made-up words fill it."""
    texts = (*_HEADS, *_VERBS, *_ADJECTIVES, *_NOUNS, *_PLACES, "a the or ? . ,")
    words = dict.fromkeys(word for text in texts for word in text.split())
    syllables = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "ai")]
    twos = [a + b for a in syllables for b in syllables]
    longer = itertools.chain(
        (a + c for a in twos for c in ("", "n", "r", "s", "lo")),
        (a + b for a in twos for b in syllables),
    )
    wanted = vocab_size - len(SPECIAL_TOKENS)
    for word in longer:
        if len(words) == wanted:
            break
        words.setdefault(word)
    return Tokenizer([*SPECIAL_TOKENS, *list(words)[:wanted]])


@torch.inference_mode()
def inputs(model: Model, batch: int) -> Inputs:
    """The network's inputs of the model's first prompts, whose seeds are 0, 1, …"""
    settings, device = model.settings, model.device
    sizes = model.denoiser.config
    ids, mask, _ = source_batch(
        model.tokenizer.encode(model.texts(batch)), sizes.seq_len, model.tokenizer,
        settings.max_source_tokens, "truncate", sizes.source_positions,
    )  # fmt: skip
    draws = draws_of(list(range(batch)), [0] * batch, 0, torch.device("cpu")).to(device)
    length, width = model.denoiser.config.seq_len, model.denoiser.config.embedding_dim
    noise = normal_of_draws(draws, Stream.GENERATION, length, width)
    x_t = noised(model, ids.to(device), mask.to(device), draws)
    t = torch.full((batch,), settings.t_init, device=device)
    return Inputs(ids, mask, draws, noise, x_t, t)


def noised(model: Model, ids: Tensor, mask: Tensor, draws: Tensor) -> Tensor:
    """x_t [B, L, d] of a first call: noise on target positions, embeddings elsewhere."""
    last = float(model.denoiser.schedule.alphas_cumprod[model.settings.t_init])
    sigma = torch.full((len(ids),), (1 - last) ** 0.5, device=ids.device)
    table = model.vocabulary.table
    return diffuse_of_draws(
        table, ids, torch.zeros_like(sigma), sigma, mask, draws, Stream.GENERATION
    )


def work(case: Case, precision: str) -> Work:
    """Weights and table read once; the products of the network and of rounding."""
    config = case.config
    hidden, d, tokens = config.hidden_size, config.embedding_dim, case.batch * config.seq_len
    layer = 4 * hidden * hidden + 2 * hidden * config.ffn_size
    weights = config.num_layers * layer + 2 * (hidden * hidden + hidden * d)
    attention = 2 * config.num_layers * config.seq_len * hidden
    table = config.vocab_size * d
    width = 4 if precision == "fp32" else 2
    flops = 2 * tokens * (weights + attention + table)
    return Work(width * (weights + table), flops, precision)


def _fit_last_layer(model: Model) -> None:
    """Ridge regression of the outputs on embeddings: words, then [SEP] and [PAD]."""
    backbone, config = model.denoiser.lm.backbone, model.denoiser.config
    given = inputs(model, _FITTED_ROWS)
    with torch.inference_mode():
        hidden = backbone.features(given.x_t, model.denoiser.schedule.network_time(given.t))[0]
        before = backbone.output_projection[:-1](hidden).flatten(0, 1).double()
    before = torch.cat([before, torch.ones_like(before[:, :1])], 1)
    expected = _answer(config.seq_len, model.tokenizer).repeat(_FITTED_ROWS)
    square = before.T @ before
    square.diagonal().add_(_RIDGE * len(before))
    wanted = before.T @ model.vocabulary.table[expected].double()
    fitted = torch.linalg.solve(square, wanted).float()
    last = backbone.output_projection[-1]
    assert isinstance(last, nn.Linear)
    last.weight.data.copy_(fitted[:-1].T)
    last.bias.data.copy_(fitted[-1])


def _answer(length: int, tokenizer: TextTokenizer) -> Tensor:
    """Ids [L]: a word at each position until the text ends."""
    end = min(_LAST_WORD, length - 2)
    ids = torch.arange(length) % 40 + len(SPECIAL_TOKENS)
    ids[end], ids[end + 1 :] = tokenizer.sep_id, tokenizer.pad_id
    return ids
