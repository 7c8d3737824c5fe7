"""A loaded model: text → tokens → one-step generator (or teacher sampler) → rounding → text."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, overload

import torch
from torch import Tensor
from tqdm import tqdm

from dlmone_fast.data.batches import source_batch
from dlmone_fast.data.layouts import SEPARATORS, kept_lengths
from dlmone_fast.errors import TokenizerMissingError, UsageError
from dlmone_fast.evaluation.generations import clean_text
from dlmone_fast.evaluation.mbr import select_mbr
from dlmone_fast.evaluation.protocol import CandidateBatch
from dlmone_fast.kernels.nearest_token import Vocabulary, nearest_token
from dlmone_fast.kernels.noise import Stream, normal
from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.models.folder import ModelFolder, copy_folder
from dlmone_fast.runtime import options
from dlmone_fast.runtime.options import GenerationOutput, GenerationSettings
from dlmone_fast.runtime.ties import round_canonically
from dlmone_fast.samplers.loop import SamplerOptions, sample
from dlmone_fast.samplers.one_step import generate_embeddings
from dlmone_fast.tokenizer import Tokenizer

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class _Rows:
    """Generation rows: every prompt once per candidate."""

    ids: Tensor
    mask: Tensor
    seeds: list[int]
    candidates: list[int]

    def __len__(self) -> int:
        return len(self.seeds)

    def part(self, first: int, last: int) -> _Rows:
        rows = slice(first, last)
        return _Rows(self.ids[rows], self.mask[rows], self.seeds[rows], self.candidates[rows])


class Generator:
    """A student or teacher that turns source texts into target texts.

    Attributes:
        denoiser: the networks.
        tokenizer: text ↔ ids; None for an import without a vocabulary.
        settings: the model's own defaults.
        precision: fp32, bf16 or fp16 (autocast of the network; rounding stays float32).
        folder: the model folder it came from; None: built in memory.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        tokenizer: Tokenizer | None,
        settings: GenerationSettings,
        precision: str = "fp32",
        folder: ModelFolder | None = None,
    ) -> None:
        self.denoiser = denoiser
        self.folder = folder
        self.settings = settings
        self.precision = precision
        self._tokenizer = tokenizer
        # The table is frozen here: normalising it once a load instead of once a call.
        self._table = denoiser.embedding.detach()
        self._vocabulary = Vocabulary(self._table)

    @property
    def task(self) -> str:
        """The task that the model was trained on, where its folder says so."""
        source = self.folder.config.get("source") if self.folder else None
        return str(source.get("task", "")) if isinstance(source, dict) else ""

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self._table.device

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            TokenizerMissingError: the model folder has none.
        """
        if self._tokenizer is None:
            raise TokenizerMissingError(
                "this model folder has no tokenizer.json, so it cannot read text; import the "
                "checkpoint again with --vocab vocab.txt"
            )
        return self._tokenizer

    def normalize_text(self, text: str) -> str:
        """The text as the tokenizer reproduces it: what a perfect model would return."""
        return self.tokenizer.decode_clean(self.tokenizer.encode([text])[0])

    def decode_text(self, ids: Sequence[int]) -> str:
        """Ids as text, without special tokens."""
        return self.tokenizer.decode_clean(ids)

    def encode_jointly(self, source: str, target: str) -> tuple[list[int], list[int]]:
        """Ids of a pair, cut together as DiffuSeq cuts its rows: each from [CLS] to [SEP]."""
        src, trg = self.tokenizer.encode([source, target])
        room = self.denoiser.config.seq_len - SEPARATORS
        src_kept, trg_kept = kept_lengths(len(src) - 1, len(trg) - 1, room)
        return [*src[:src_kept], src[-1]], [*trg[:trg_kept], trg[-1]]

    def save_pretrained(self, path: str | os.PathLike[str]) -> Path:
        """Write the model folder again, under another path.

        Raises:
            UsageError: the model was not loaded from a folder.
        """
        if self.folder is None:
            raise UsageError(
                "save_pretrained: this model was built in memory; a training run writes its "
                "folder itself"
            )
        return copy_folder(self.folder, path)

    # A str is a Sequence[str] too; the first overload is the one that decides.
    @overload
    def generate(  # type: ignore[overload-overlap]
        self, batch: str, *, return_dict: Literal[False] = False, **call: object
    ) -> str | list[str]: ...

    @overload
    def generate(
        self, batch: Sequence[str], *, return_dict: Literal[False] = False, **call: object
    ) -> list[str] | list[list[str]]: ...

    @overload
    def generate(
        self, batch: str | Sequence[str], *, return_dict: Literal[True], **call: object
    ) -> GenerationOutput: ...

    def generate(  # type: ignore[misc]
        self,
        batch: str | Sequence[str],
        *,
        steps: int | None = None,
        num_candidates: int = 1,
        select: str = "none",
        seed: int | Sequence[int] | None = 0,
        batch_size: int = 64,
        sampler: str | None = None,
        eta: float | None = None,
        on_overflow: str = "error",
        return_dict: bool = False,
        progress: bool | None = None,
    ) -> str | list[str] | list[list[str]] | GenerationOutput:
        """Generate a target for each source: a str gives a str, a list a list in order.

        A prompt's text depends on the prompt, its seed and the arguments below, never on the
        other prompts of the call: exactly for a student on a CPU in fp32, up to near ties that
        a product's rounding decides elsewhere.

        Args:
            batch: one source text, or a list of them.
            steps: network calls; None: the model's default (1 for a student).
            num_candidates: candidates a prompt, each from its own noise (at most 64).
            select: "none" returns all candidates (a list a prompt, if more than one); "mbr"
                returns the candidate that agrees most with the others.
            seed: one seed for all prompts, one a prompt, or None for fresh ones.
            batch_size: rows a network call.
            sampler: a teacher's sampler, one of `dlmone_fast.samplers.METHODS`.
            eta: noise of a teacher's ddim sampler, 0 (deterministic) to 1.
            on_overflow: "error" refuses a source above the model's limit, "truncate" cuts it.
            return_dict: return a `GenerationOutput` instead.
            progress: show a progress bar; None: for more than one batch on a terminal.

        Raises:
            PromptError: a prompt is not a str, not Unicode, or too long.
            UsageError: another argument is out of its bounds.
            TokenizerMissingError: the model folder has no tokenizer.
        """
        options.one_of("select", select, options.SELECTIONS)
        prompts = options.prompts_of(batch)
        seeds = options.seeds_of(seed, len(prompts))
        batched = self.generate_candidates(
            prompts,
            num_candidates=num_candidates,
            steps=steps,
            seeds=seeds,
            batch_size=batch_size,
            sampler=sampler,
            eta=eta,
            on_overflow=on_overflow,
            progress=progress,
        )
        chosen = [select_mbr(texts) if select == "mbr" else 0 for texts in batched.texts]
        if return_dict:
            return self._output(batched, chosen, seeds, steps)
        if num_candidates > 1 and select == "none":
            answers: list[str] | list[list[str]] = batched.texts
        else:
            answers = [texts[i] for texts, i in zip(batched.texts, chosen, strict=True)]
        return answers[0] if isinstance(batch, str) else answers

    def generate_candidates(
        self,
        texts: Sequence[str],
        *,
        num_candidates: int = 1,
        steps: int | None = None,
        seeds: Sequence[int],
        batch_size: int = 64,
        sampler: str | None = None,
        eta: float | None = None,
        on_overflow: str = "error",
        progress: bool | None = None,
        encoded: Sequence[Sequence[int]] | None = None,
        decode: str = "clean",
    ) -> CandidateBatch:
        """All candidates of each text, with the ids they were decoded from.

        Arguments as for `generate`, with one seed a text. `encoded` holds the texts' ids where the
        caller has cut them itself (`encode_jointly`); only the layout limits their length. `decode`
        "diffuseq" reads the decoder's arg-max instead of the nearest embedding and cuts nothing at
        [SEP], as the original's decoding and clean-up do.
        """
        started = time.perf_counter()
        options.whole_number("num_candidates", num_candidates, 1, options.MAX_CANDIDATES)
        options.whole_number("batch_size", batch_size, 1, options.MAX_BATCH_SIZE)
        options.one_of("on_overflow", on_overflow, options.OVERFLOWS)
        options.one_of("decode", decode, options.DECODINGS)
        settings = self.settings.with_call(steps, sampler, eta)
        limit = self.settings.max_source_tokens
        if encoded is None:
            encoded = self.tokenizer.encode(list(texts))
        else:
            limit = self.denoiser.config.seq_len - SEPARATORS
        rows, truncated = self._rows(encoded, limit, seeds, num_candidates, on_overflow)
        ids = self._generate_rows(rows, settings, batch_size, progress, decode)
        targets = [
            row[mask != 0].tolist() for row, mask in zip(ids, rows.mask.to(ids.device), strict=True)
        ]
        decoded = [self._text(target, decode) for target in targets]
        n = num_candidates
        return CandidateBatch(
            texts=[decoded[i : i + n] for i in range(0, len(decoded), n)],
            token_ids=[targets[i : i + n] for i in range(0, len(targets), n)],
            truncated=truncated,
            seconds=time.perf_counter() - started,
        )

    def _text(self, target: list[int], decode: str) -> str:
        if decode == "diffuseq":
            return clean_text(self.tokenizer.decode(target), drop_padding=True)
        return self.tokenizer.decode_clean(target)

    def _rows(
        self,
        encoded: Sequence[Sequence[int]],
        limit: int,
        seeds: Sequence[int],
        n: int,
        on_overflow: str,
    ) -> tuple[_Rows, list[bool]]:
        ids, mask, truncated = source_batch(
            encoded,
            self.denoiser.config.seq_len,
            self.tokenizer,
            limit,
            on_overflow=on_overflow,  # type: ignore[arg-type]
        )
        rows = _Rows(
            ids.repeat_interleave(n, 0),
            mask.repeat_interleave(n, 0),
            [seed for seed in seeds for _ in range(n)],
            list(range(n)) * len(encoded),
        )
        return rows, truncated

    def _generate_rows(
        self,
        rows: _Rows,
        settings: GenerationSettings,
        batch_size: int,
        progress: bool | None,
        decode: str,
    ) -> Tensor:
        parts = [
            self._generate_ids(rows.part(first, first + batch_size), settings, decode)
            for first in _progress(range(0, len(rows), batch_size), progress)
        ]
        return torch.cat(parts) if parts else rows.ids

    @torch.inference_mode()
    def _generate_ids(
        self, rows: _Rows, settings: GenerationSettings, decode: str = "clean"
    ) -> Tensor:
        """Ids [B, L] of one network batch; source positions keep their ids."""
        ids, mask = rows.ids.to(self.device), rows.mask.to(self.device)
        x0, target = self._embeddings(rows, ids, mask, settings), mask != 0
        if decode == "diffuseq":
            return torch.where(target, self.denoiser.logits(x0).argmax(-1), ids)
        if len(rows) > 1 and self._has_canonical_ids(settings):

            def alone(row: int) -> Tensor:
                return self._generate_ids(rows.part(row, row + 1), settings)[0]

            found, _ = round_canonically(x0, target, self._vocabulary, alone)
            return torch.where(target, found, ids)
        found = torch.zeros_like(ids)
        found[target] = nearest_token(x0[target], self._vocabulary)
        return torch.where(target, found, ids)

    def _has_canonical_ids(self, settings: GenerationSettings) -> bool:
        # A sampler that rounds on its way, or 16-bit noise, is beyond what margins can mend.
        return settings.kind == "student" and self.precision == "fp32" and self.device.type == "cpu"

    def _embeddings(
        self, rows: _Rows, ids: Tensor, mask: Tensor, settings: GenerationSettings
    ) -> Tensor:
        source = self._table[ids]

        def noise(step: int) -> Tensor:
            length, width = source.shape[1:]
            stream = Stream.GENERATION
            samples = rows.candidates
            return normal(rows.seeds, stream, samples, step, length, width, device=self.device)

        schedule = self.denoiser.schedule
        if settings.kind == "teacher":
            chosen = SamplerOptions(settings.sampler, settings.steps, settings.eta)
            return sample(
                self._predict, schedule, chosen, source, mask, noise, self._round_to_embedding
            )
        t_init, steps, scale = settings.t_init, settings.steps, settings.scale_latent
        return generate_embeddings(
            self._predict, schedule, t_init, steps, source, mask, noise, scale
        )

    def _round_to_embedding(self, x: Tensor) -> Tensor:
        return self._table[nearest_token(x, self._vocabulary)]

    def _predict(self, x_t: Tensor, t: Tensor) -> Tensor:
        if self.precision == "fp32":
            return self.denoiser(x_t, t)
        with torch.autocast(self.device.type, _AUTOCAST[self.precision]):
            return self.denoiser(x_t, t)

    def _output(
        self, batched: CandidateBatch, chosen: list[int], seeds: list[int], steps: int | None
    ) -> GenerationOutput:
        pick = list(enumerate(chosen))
        return GenerationOutput(
            texts=[batched.texts[row][i] for row, i in pick],
            candidates=batched.texts,
            token_ids=[batched.token_ids[row][i] for row, i in pick],
            truncated=batched.truncated,
            seeds=seeds,
            steps=steps or self.settings.steps,
            seconds=batched.seconds,
        )


def _progress(batches: range, progress: bool | None) -> Iterator[int]:
    # tqdm's own None hides the bar when stderr is no terminal.
    hidden = None if progress is None and len(batches) > 1 else not progress
    yield from tqdm(batches, desc="generate", unit="batch", disable=hidden, leave=False)
