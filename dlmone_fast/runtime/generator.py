"""A loaded model: text → tokens → one-step generator (or teacher sampler) → rounding → text."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, overload

import torch

from dlmone_fast.arguments import refuse_one
from dlmone_fast.config.room import largest_source
from dlmone_fast.data.batches import source_batch
from dlmone_fast.data.layouts import kept_lengths
from dlmone_fast.data.slots import absent_id, sources_in_slots
from dlmone_fast.errors import PromptError, TokenizerMissingError, UsageError
from dlmone_fast.evaluation.generations import clean_text
from dlmone_fast.evaluation.mbr import select_mbr
from dlmone_fast.evaluation.protocol import CandidateBatch
from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.models.folder import ModelFolder, copy_folder
from dlmone_fast.runtime import options
from dlmone_fast.runtime.calibration import network_inputs
from dlmone_fast.runtime.engines import EngineRequest, make_engine
from dlmone_fast.runtime.executor import Executor
from dlmone_fast.runtime.options import GenerationOutput, GenerationSettings
from dlmone_fast.runtime.pool import MAX_QUEUED, unloaded_error
from dlmone_fast.runtime.rows import Rows
from dlmone_fast.runtime.streaming import in_windows, with_progress
from dlmone_fast.text_tokenizer import TextTokenizer


class Generator:
    """A student or teacher that turns source texts into target texts.

    Attributes:
        tokenizer: text ↔ ids; None for an import without a vocabulary.
        settings: the model's own defaults.
        folder: the model folder it came from; None: built in memory.

    Args:
        precision: fp32, bf16, fp16 or int8, of the network; rounding stays float32.
        backend: what runs the network, one of `dlmone_fast.runtime.engines.BACKENDS`.
        calibration: real prompts that int8 measures its scales on.
        max_queued: calls that may wait for the model before `QueueFullError`.

    Raises:
        BackendUnavailableError: the backend asked for cannot run this model here.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        tokenizer: TextTokenizer | None,
        settings: GenerationSettings,
        precision: str = "fp32",
        folder: ModelFolder | None = None,
        *,
        backend: str = "eager",
        calibration: Sequence[str] | None = None,
        max_queued: int = MAX_QUEUED,
    ) -> None:
        self._denoiser: Denoiser | None = denoiser
        self.folder = folder
        self.settings = settings
        self._tokenizer = tokenizer
        options.whole_number("max_queued", max_queued, 0, options.MAX_PROMPTS)
        examples = None
        if calibration is not None:
            options.refuse_calibration(precision)
            examples = partial(network_inputs, denoiser, settings, self._encoded(calibration))
        with_estimate = settings.kind == "teacher" and denoiser.config.self_conditioning
        request = EngineRequest(denoiser, precision, examples, with_estimate)
        self._executor = Executor(denoiser, make_engine(backend, request), max_queued)

    def __reduce__(self) -> NoReturn:
        """Refuse to be pickled or copied: engines belong to their process.

        Raises:
            UsageError: always.
        """
        where = self.folder.path if self.folder else "its folder"
        raise UsageError(
            "a loaded model cannot be sent to another process, nor copied; load it in that process "
            f"instead: dlmone_fast.load({str(where)!r})"
        )

    @property
    def task(self) -> str:
        """The task that the model was trained on, where its folder says so."""
        source = self.folder.config.get("source") if self.folder else None
        return str(source.get("task", "")) if isinstance(source, dict) else ""

    @property
    def denoiser(self) -> Denoiser:
        """The networks.

        Raises:
            ModelNotLoadedError: it was unloaded.
        """
        denoiser = self._denoiser
        if denoiser is None:
            raise unloaded_error()
        return denoiser

    @property
    def backend(self) -> str:
        """What runs the network: eager, compile, graph or openvino."""
        return self._executor.pool.engine.name

    @property
    def precision(self) -> str:
        """fp32, bf16, fp16 or int8, of the network; rounding stays float32."""
        return self._executor.pool.engine.precision

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self._executor.device

    @property
    def tokenizer(self) -> TextTokenizer:
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
        """The text in the model's spelling, as which sources and references are compared: case,
        spaces and punctuation are its own, every word and every accent is the text's."""
        return self.tokenizer.respell(text)

    def through_vocabulary(self, text: str) -> str:
        """The text as the tokenizer gives it back: what a perfect model would return."""
        return self.tokenizer.decode_clean(self.tokenizer.encode([text], "text".format)[0])

    def decode_text(self, ids: Sequence[int]) -> str:
        """Ids as text, without special tokens."""
        return self.tokenizer.decode_clean(ids)

    def encode_jointly(self, source: str, target: str) -> tuple[list[int], list[int]]:
        """Ids of a pair, cut together as DiffuSeq cuts its rows: each from [CLS] to [SEP]."""
        self._executor.pool.check_open()
        sizes = self.denoiser.config
        src, trg = self.tokenizer.encode([source, target], ("source", "target").__getitem__)
        lengths = len(src) - 1, len(trg) - 1
        src_kept, trg_kept = kept_lengths(*lengths, sizes.seq_len, sizes.source_positions)
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
        temperature: float | None = None,
        on_overflow: str = "error",
        batch_invariant: bool = False,
        return_dict: bool = False,
        progress: bool | None = None,
    ) -> str | list[str] | list[list[str]] | GenerationOutput:
        """Generate a target for each source: a str gives a str, a list a list in order.

        A prompt's text depends on the prompt, its seed and the arguments below, never on the
        other prompts of the call: exactly for a student on a CPU in fp32 and with
        `batch_invariant`, up to near ties that a product's rounding decides elsewhere.

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
            temperature: factor of all noise, from 0, where a source has one text, to 10; None: the
                model's default.
            on_overflow: "error" refuses a source above the model's limit, "truncate" cuts it.
            batch_invariant: run every row alone, so that no other row can move a bit of it, in any
                precision, whatever batch_size; costs what batching saves.
            return_dict: return a `GenerationOutput` instead.
            progress: show a progress bar; None: for more than one batch on a terminal.

        Raises:
            PromptError: a prompt is not a str, not Unicode, or too long.
            UsageError: another argument is out of its bounds.
            TokenizerMissingError: the model folder has no tokenizer.
            QueueFullError: too many calls wait for this model already.
            ModelNotLoadedError: it was unloaded.
            ForkedProcessError: it had run before this process was forked.
        """
        options.one_of("select", select, options.SELECTIONS)
        options.whole_number("num_candidates", num_candidates, 1, options.MAX_CANDIDATES)
        if select == "mbr" and num_candidates < 2:
            raise UsageError(
                "select: 'mbr' needs candidates to choose from, and num_candidates is 1; pass "
                "num_candidates=10, or leave select out"
            )
        # Before anything is read: a full queue refuses a large batch as fast as a small one.
        with self._executor.pool.call():
            prompts = options.prompts_of(batch)
            named = "batch".format if isinstance(batch, str) else "batch[{}]".format
            seeds = options.seeds_of(seed, len(prompts))
            batched = self._candidates(
                prompts,
                num_candidates=num_candidates,
                steps=steps,
                seeds=seeds,
                batch_size=batch_size,
                sampler=sampler,
                eta=eta,
                temperature=temperature,
                on_overflow=on_overflow,
                batch_invariant=batch_invariant,
                progress=progress,
                named=named,
            )
        chosen = [select_mbr(texts) if select == "mbr" else 0 for texts in batched.texts]
        if return_dict:
            return self._output(batched, chosen, seeds, steps)
        if num_candidates > 1 and select == "none":
            answers: list[str] | list[list[str]] = batched.texts
        else:
            answers = [texts[i] for texts, i in zip(batched.texts, chosen, strict=True)]
        return answers[0] if isinstance(batch, str) else answers

    def generate_iter(
        self,
        prompts: Iterable[str],
        *,
        batch_size: int = 64,
        seed: int | None = 0,
        on_overflow: str = "error",
        **call: Any,
    ) -> Iterator[Any]:
        """Generate from any number of prompts, one answer a prompt, in order.

        Holds a window of a few batches in memory; within it, prompts of similar length share a
        batch. Answers are those that `generate` gives.

        Args:
            prompts: source texts; read as answers are taken.
            batch_size: rows a network call.
            seed: the seed of every prompt; None for fresh ones.
            on_overflow: as for `generate`.
            call: further arguments of `generate` but `return_dict`.

        Raises:
            UsageError: an argument is out of its bounds.
            PromptError: when a bad prompt's window is reached; it names the prompt's place.
            ModelNotLoadedError: the model was unloaded.
        """
        self._executor.pool.check_open()
        refuse_one("prompts", prompts, PromptError)
        options.whole_number("batch_size", batch_size, 1, options.MAX_BATCH_SIZE)
        if seed is not None:
            options.whole_number("seed", seed, 0, options.MAX_SEED)
        if "return_dict" in call:
            raise UsageError("return_dict: generate_iter yields answers one by one; leave it out")
        shared = {"seed": seed, "on_overflow": on_overflow, "progress": False, **call}
        generate = partial(self.generate, batch_size=batch_size, **shared)

        def check(prompt: str, name: str) -> None:
            self.check_prompt(prompt, on_overflow, name)

        return in_windows(prompts, batch_size, generate, check)

    def check_prompt(self, prompt: str, on_overflow: str = "error", name: str = "prompt") -> None:
        """Refuse what `generate` would refuse of one prompt, without running the network.

        Args:
            prompt: a source text.
            on_overflow: as for `generate`.
            name: what an error calls the prompt.

        Raises:
            PromptError: it is not a str, not Unicode, or too long.
            ModelNotLoadedError: the model was unloaded.
        """
        self._executor.pool.check_open()
        if not isinstance(prompt, str):
            raise PromptError(f"{name} must be a str, got {type(prompt).__name__}")
        limit = self.settings.max_source_tokens

        def named(_: int) -> str:
            return name

        if on_overflow == "error":
            options.refuse_longest([prompt], self.tokenizer, limit, named)
        encoded = self.tokenizer.encode([prompt], named)
        self._rows(encoded, limit, [0], 1, on_overflow, named)

    def warmup(
        self, batch_sizes: Sequence[int] = (1,), lengths: Sequence[int] | None = None
    ) -> None:
        """Make ready what the first calls would wait for: captured graphs, packed weights.

        Args:
            batch_sizes: rows a network call, as calls will ask for.
            lengths: sequence lengths; a model that attends to its padding has one, seq_len.

        Raises:
            UsageError: a length that the model never runs at.
            ModelNotLoadedError: the model was unloaded.
        """
        self._executor.pool.check_open()
        refuse_one("batch_sizes", batch_sizes)
        only = self.denoiser.config.seq_len
        if lengths is not None and set(lengths) != {only}:
            raise UsageError(
                f"lengths must be [{only}], got {list(lengths)}: this model attends to its padding "
                "and always runs at its full length"
            )
        for size in batch_sizes:
            options.whole_number("batch_sizes", size, 1, options.MAX_BATCH_SIZE)
            shortest = self.tokenizer.encode([self.tokenizer.example], "batch[{}]".format) * size
            limit = self.settings.max_source_tokens
            rows, _ = self._rows(shortest, limit, [0] * size, 1, "error", "batch[{}]".format)
            self._executor.warmup(rows, self.settings)

    @property
    def unloaded(self) -> bool:
        """Whether `unload` was called."""
        return self._executor.pool.closed

    def unload(self) -> None:
        """Wait for calls under way, refuse later ones, and give the model's memory back."""
        self._executor.close()
        self._denoiser = None

    def _encoded(self, texts: Sequence[str]) -> Rows:
        refuse_one("calibration", texts, PromptError)
        named, texts = "calibration[{}]".format, list(texts)
        rows, _ = self._rows(
            self.tokenizer.encode(texts, named),
            self.settings.max_source_tokens,
            [0] * len(texts),
            1,
            "truncate",
            named,
        )
        return rows

    def generate_candidates(self, texts: Sequence[str], **call: Any) -> CandidateBatch:
        """All candidates of each text, with the ids they were decoded from.

        Arguments as for `generate`, with `seeds`, one a text. `encoded` holds the texts' ids where
        the caller has cut them itself (`encode_jointly`); only the layout limits their length.
        `decode` "diffuseq" reads the decoder's arg-max instead of the nearest embedding and cuts
        nothing at [SEP], as the original's decoding and clean-up do.
        """
        refuse_one("texts", texts, PromptError)
        with self._executor.pool.call():
            return self._candidates(texts, **call)

    def _candidates(
        self,
        texts: Sequence[str],
        *,
        num_candidates: int = 1,
        steps: int | None = None,
        seeds: Sequence[int],
        batch_size: int = 64,
        sampler: str | None = None,
        eta: float | None = None,
        temperature: float | None = None,
        on_overflow: str = "error",
        batch_invariant: bool = False,
        progress: bool | None = None,
        encoded: Sequence[Sequence[int]] | None = None,
        decode: str = "clean",
        named: options.Named = "texts[{}]".format,
    ) -> CandidateBatch:
        started = time.perf_counter()
        options.whole_number("num_candidates", num_candidates, 1, options.MAX_CANDIDATES)
        options.whole_number("batch_size", batch_size, 1, options.MAX_BATCH_SIZE)
        options.one_of("on_overflow", on_overflow, options.OVERFLOWS)
        options.one_of("decode", decode, options.DECODINGS)
        settings = self.settings.with_call(steps, sampler, eta, temperature)
        limit = self.settings.max_source_tokens
        if encoded is None:
            if on_overflow == "error":
                options.refuse_longest(texts, self.tokenizer, limit, named)
            encoded = self.tokenizer.encode(list(texts), named)
        else:
            sizes = self.denoiser.config
            limit = largest_source(sizes.seq_len, sizes.source_positions, sizes.source)
        rows, truncated = self._rows(encoded, limit, seeds, num_candidates, on_overflow, named)
        size = 1 if batch_invariant else batch_size
        targets = self._targets(rows, settings, decode, size, progress)
        decoded = [self._text(target, decode) for target in targets]
        n = num_candidates
        return CandidateBatch(
            texts=[decoded[i : i + n] for i in range(0, len(decoded), n)],
            token_ids=[targets[i : i + n] for i in range(0, len(targets), n)],
            truncated=truncated,
            seconds=time.perf_counter() - started,
        )

    def _targets(
        self,
        rows: Rows,
        settings: GenerationSettings,
        decode: str,
        size: int,
        progress: bool | None,
    ) -> list[list[int]]:
        """Ids on the target positions of each row, `size` rows a network call."""
        executor, sizes = self._executor, self.denoiser.config
        order: Sequence[int] = range(len(rows))
        if sizes.in_slots and len(rows) > size:
            # Rows of similar length share a call, which is as long as its longest source.
            lengths = (rows.ids != absent_id(sizes.vocab_size)).sum(1).tolist()
            order = sorted(order, key=lengths.__getitem__)
            rows = rows.chosen(order)
        targets: list[list[int]] = [[] for _ in order]
        for first in with_progress(range(0, len(rows), size), progress):
            part = executor.fitted(rows.part(first, first + size))
            ids = executor.ids(part, settings, decode)
            for row, found, mask in zip(order[first : first + size], ids, part.mask, strict=True):
                targets[row] = found[mask != 0].tolist()
        return targets

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
        named: options.Named = "texts[{}]".format,
    ) -> tuple[Rows, list[bool]]:
        ids, mask, truncated = self._laid_out(encoded, limit, on_overflow, named)
        if n > 1:
            ids, mask = ids.repeat_interleave(n, 0), mask.repeat_interleave(n, 0)
        rows = Rows(
            ids,
            mask,
            [seed for seed in seeds for _ in range(n)],
            list(range(n)) * len(encoded),
        )
        return rows, truncated

    def _laid_out(
        self,
        encoded: Sequence[Sequence[int]],
        limit: int,
        on_overflow: str,
        named: options.Named,
    ) -> tuple[torch.Tensor, torch.Tensor, list[bool]]:
        sizes = self.denoiser.config
        if sizes.in_slots:
            pad_id = self.tokenizer.pad_id
            return sources_in_slots(encoded, sizes, pad_id, limit, on_overflow, named)
        return source_batch(
            encoded,
            sizes.seq_len,
            self.tokenizer,
            limit,
            on_overflow,  # type: ignore[arg-type]
            sizes.source_positions,
            named,
        )

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
