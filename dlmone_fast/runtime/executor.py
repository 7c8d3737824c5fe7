"""Rows of a call → ids, on the runners of a pool."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from dlmone_fast.kernels.nearest_token import Vocabulary, nearest_token
from dlmone_fast.kernels.noise import Stream, normal
from dlmone_fast.models.denoiser import Denoiser
from dlmone_fast.runtime.engines import Engine, Runner
from dlmone_fast.runtime.engines.capture import is_out_of_memory
from dlmone_fast.runtime.options import GenerationSettings
from dlmone_fast.runtime.pipeline import Pipeline
from dlmone_fast.runtime.pool import RunnerPool
from dlmone_fast.runtime.rows import Rows
from dlmone_fast.runtime.ties import clear_margin, unclear_rows
from dlmone_fast.samplers.loop import SamplerOptions, sample

# Few-step generation with other numbers of steps than these makes room first.
_MOST_PIPELINES = 32

_log = logging.getLogger("dlmone_fast")


class Executor:
    """Runs a model's rows.

    Args:
        denoiser: the networks: schedule, table and decoder; the engine has the backbone.
        engine: what runs the backbone.
        max_queued: calls that may wait.
    """

    def __init__(self, denoiser: Denoiser, engine: Engine, max_queued: int) -> None:
        self.denoiser = denoiser
        self.pool = RunnerPool(engine, max_queued)
        # The table is frozen here: normalising it once a load instead of once a call.
        self.vocabulary = Vocabulary(denoiser.embedding.detach())
        # The rows that ids name; a model with slots has one more than it rounds to.
        in_slots = denoiser.config.in_slots
        self.lookup = denoiser.lm.tokens.lookup().detach() if in_slots else self.vocabulary.table
        self.device = self.vocabulary.table.device
        self._clear = clear_margin(self.vocabulary.table)
        self._pipelines: dict[tuple[int, int, bool, float], Pipeline] = {}
        self._warming = threading.Lock()
        # The most rows that are tried at once on a GPU whose memory did not hold more; None: all.
        self._fitting: int | None = None

    def fitted(self, rows: Rows) -> Rows:
        """Rows at a length that the engine runs: that of their longest source, where the sources
        are in slots, or the model's own."""
        sizes = self.denoiser.config
        if not sizes.in_slots:
            return rows
        return rows.cut_to_longest(sizes) if self.pool.engine.any_length else rows.filled(sizes)

    @property
    def table(self) -> Tensor:
        """The embeddings E [V, d]."""
        return self.vocabulary.table

    def pipeline(self, settings: GenerationSettings) -> Pipeline:
        """A student's generation with these settings."""
        key = (settings.t_init, settings.steps, settings.scale_latent, settings.temperature)
        found = self._pipelines.get(key)
        if found is None:
            if len(self._pipelines) >= _MOST_PIPELINES:
                self._pipelines.clear()
            found = self._pipelines[key] = Pipeline(
                self.denoiser.schedule, self.vocabulary, *key, self.lookup
            )
        return found

    def close(self) -> None:
        """Wait for calls under way, refuse later ones, and let go of the networks."""
        self.pool.close()
        self._pipelines.clear()
        self.vocabulary = self.lookup = self.denoiser = None  # type: ignore[assignment]

    @torch.inference_mode()
    def ids(self, rows: Rows, settings: GenerationSettings, decode: str = "clean") -> Tensor:
        """Ids [B, L] of one network batch, on the CPU; source positions keep their ids.

        In parts, where the whole does not fit into a GPU's memory.
        """
        done, first = [], 0
        with self.pool.runner() as runner:
            while first < len(rows):
                part = rows.part(first, first + (self._fitting or len(rows)))
                found = self._generated_if_it_fits(runner, part, settings, decode)
                if found is None:
                    self._shrink(len(part))
                else:
                    done.append(found)
                    first += len(part)
        return torch.cat(done) if done else rows.ids

    def _generated_if_it_fits(
        self, runner: Runner, rows: Rows, settings: GenerationSettings, decode: str
    ) -> Tensor | None:
        try:
            return self._generated(runner, rows, settings, decode)
        except RuntimeError as error:
            if len(rows) == 1 or not is_out_of_memory(error):
                raise
            # The error holds on to the memory of what failed: it ends here.
            return None

    def _shrink(self, rows: int) -> None:
        self._fitting = min(self._fitting or rows, rows // 2)
        _log.warning(
            "%d rows do not fit into the device's memory; parts of %d from now on",
            rows,
            self._fitting,
        )
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()

    def _generated(
        self, runner: Runner, rows: Rows, settings: GenerationSettings, decode: str
    ) -> Tensor:
        if settings.kind == "student" and decode == "clean":
            return self._student(runner, rows, settings)
        ids, mask = rows.ids.to(self.device), rows.mask.to(self.device)
        if settings.kind == "student":
            draws = rows.batch(settings.steps).draws.to(self.device)
            x0 = self.pipeline(settings).embeddings(runner.predict, ids, mask, draws)
        else:
            x0 = self._sampled(runner, rows, ids, mask, settings)
        target = mask != 0
        if decode == "diffuseq":
            return torch.where(target, self.denoiser.logits(x0).argmax(-1), ids).cpu()
        found = ids.clone()
        found[target] = nearest_token(x0[target], self.vocabulary)
        return found.cpu()

    @torch.inference_mode()
    def warmup(self, rows: Rows, settings: GenerationSettings) -> None:
        """Let every runner answer once at the size of these rows, and alone."""
        rows = self.fitted(rows)
        # One at a time: two would wait for each other's runners.
        with self.pool.call(), self._warming, ExitStack() as held:
            # All at once: a runner that is free again would be handed out a second time.
            for _ in range(self.pool.engine.runners):
                runner = held.enter_context(self.pool.runner())
                for part in (rows, rows.part(0, 1)):
                    self._generated(runner, part, settings, "clean")

    def _student(self, runner: Runner, rows: Rows, settings: GenerationSettings) -> Tensor:
        pipeline, batch = self.pipeline(settings), rows.batch(settings.steps)
        ids, margins = runner.ids(pipeline, batch)
        if len(batch) > 1 and self._has_canonical_ids():
            for row in unclear_rows(margins, self._clear):
                alone, _ = runner.ids(pipeline, batch.part(row, row + 1))
                ids[row] = alone[0]
        return ids

    def _has_canonical_ids(self) -> bool:
        # The noise of a 16-bit network is beyond what margins can mend.
        return self.pool.engine.precision == "fp32" and self.device.type == "cpu"

    def _sampled(
        self, runner: Runner, rows: Rows, ids: Tensor, mask: Tensor, settings: GenerationSettings
    ) -> Tensor:
        source = self.lookup[ids]
        chosen = SamplerOptions(
            settings.sampler, settings.steps, settings.eta, temperature=settings.temperature
        )
        with_estimate = self.denoiser.config.self_conditioning
        return sample(
            runner.predict_given if with_estimate else runner.predict,
            self.denoiser.schedule,
            chosen,
            source,
            mask,
            _noise_of(rows, source),
            lambda x: self.table[nearest_token(x, self.vocabulary)],
            self_conditioning=with_estimate,
        )


def _noise_of(rows: Rows, like: Tensor) -> Callable[[int], Tensor]:
    length, width = like.shape[1:]

    def noise(step: int) -> Tensor:
        seeds, samples = rows.seeds, rows.candidates
        return normal(seeds, Stream.GENERATION, samples, step, length, width, device=like.device)

    return noise
