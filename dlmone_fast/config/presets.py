"""Presets, keyed by what they reproduce.

`qqp`, `quasar-t` and `wiki-auto` are the paper's settings: DiffuSeq's sizes and teacher recipe, and
DLM-One's Table 5. `qqp-small` is the compact model, its ingredients chosen by short runs
(docs/small-models.md). `g2p` is English pronunciation. `grammar` is the embedded task that shows
the whole method in minutes on two CPU cores.
"""

from __future__ import annotations

from dataclasses import replace

from dlmone_fast.config.distillation import DistillConfig, PairsConfig, StageConfig
from dlmone_fast.config.schema import (
    Config,
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    TeacherConfig,
)

# A recipe for small models: regress to the clean embedding on target positions, anchored by the
# decoder's cross-entropy on the prediction.
_ANCHORED_TEACHER = TeacherConfig(
    decay="cosine",
    beta2=0.98,
    weight_decay=0.01,
    clip_norm=1.0,
    timestep_sampler="uniform",
    embedding_noise=False,
    mse_target="clean",
    mse_positions="target",
    decoder_weight=0.0,
    prior_weight=0.0,
    anchor_weight=1.0,
)

_PAPER_EVALUATION = EvaluationConfig(teacher_steps="2000 65 20 10", teacher_rows=500)


def _paper(task: str, teacher_steps: int, stage1: StageConfig, stage2: StageConfig) -> Config:
    return Config(
        preset=task,
        model=ModelConfig(vocab_size=30_522),
        data=DataConfig(task=task, vocab_file="bert-base-uncased/vocab.txt"),
        teacher=TeacherConfig(steps=teacher_steps),
        distill=DistillConfig(stage1=stage1, stage2=stage2),
        evaluation=_PAPER_EVALUATION,
    )


def _qqp() -> Config:
    stage1 = StageConfig(mu=1.2, score_learning_rate=3e-5)
    stage2 = StageConfig(mu=0.5, sid_weight=0.9, generator_adversarial_weight=0.1)
    return _paper("qqp", 50_000, stage1, stage2)


def _quasar_t() -> Config:
    return _paper("quasar-t", 40_000, StageConfig(mu=1.2), StageConfig(mu=1.2))


def _wiki_auto() -> Config:
    # The paper reports stage 1 only for this task; a second stage repeats its settings.
    return _paper("wiki-auto", 80_000, StageConfig(mu=1.0), StageConfig(mu=1.0))


def _qqp_small() -> Config:
    stage = StageConfig(
        steps=15_000,
        mu=0.5,
        batch_size=256,
        micro_batch_size=64,
        score_learning_rate=1e-4,
        generator_learning_rate=5e-5,
        clip_value=0.0,
        clip_norm=1.0,
        ema_decay=0.999,
        weight_floor=0.05,
    )
    return Config(
        preset="qqp-small",
        precision="auto",
        model=ModelConfig(
            seq_len=64,
            embedding_dim=128,
            time_dim=128,
            hidden_size=384,
            num_layers=6,
            num_heads=6,
            ffn_size=1536,
            max_positions=64,
            norm="pre",
            normalize_embedding=True,
            noise_scale=2.0,
            source_positions=32,
        ),
        data=DataConfig(task="qqp", vocab_size=8000),
        teacher=replace(
            _ANCHORED_TEACHER,
            steps=25_000,
            batch_size=256,
            micro_batch_size=64,
            learning_rate=8e-4,
            warmup_steps=1000,
            ema_decay=0.999,
            ema_warmup=True,
            timestep_sampler="log-snr",
            save_every=500,
            validate_every=2000,
        ),
        distill=DistillConfig(
            selection_metric="ibleu",
            validation_rows=512,
            stage1=stage,
            stage2=replace(stage, steps=5000, sid_weight=0.9, generator_adversarial_weight=0.1),
        ),
        evaluation=EvaluationConfig(teacher_steps="50 20 10 5", teacher_rows=500),
    )


def _g2p() -> Config:
    stage = StageConfig(
        steps=1500,
        mu=0.5,
        batch_size=256,
        micro_batch_size=256,
        score_learning_rate=2e-4,
        generator_learning_rate=5e-5,
        score_warmup_steps=200,
        adversarial_warmup_steps=200,
        anchor_mse_weight=0.0,
        anchor_learning_rate=5e-4,
        beta2=0.98,
        clip_value=0.0,
        clip_norm=1.0,
        decay="cosine",
        ema_decay=0.998,
        ema_warmup=True,
        weight_floor=0.05,
        validate_every=500,
        save_every=250,
    )
    return Config(
        preset="g2p",
        precision="auto",
        model=ModelConfig(
            source="aligned",
            seq_len=48,
            source_positions=24,
            source_window=5,
            max_positions=24,
            embedding_dim=32,
            time_dim=64,
            hidden_size=256,
            num_layers=5,
            num_heads=4,
            ffn_size=1024,
            norm="pre",
            normalize_embedding=True,
        ),
        data=DataConfig(task="g2p", tokenizer="aligned"),
        teacher=replace(
            _ANCHORED_TEACHER,
            steps=12_000,
            batch_size=256,
            micro_batch_size=256,
            learning_rate=1e-3,
            warmup_steps=200,
            ema_decay=0.999,
            ema_warmup=True,
            timestep_sampler="log-snr",
            log_snr_uniform_share=0.1,
            # What there is to learn stands in the word, and nearly all of it.
            pure_noise_share=0.5,
            save_every=250,
            validate_every=1000,
        ),
        distill=DistillConfig(
            selection_metric="word_accuracy",
            validation_rows=5000,
            pairs=PairsConfig(
                count=400_000, per_source=4, sampler="q-sampling", steps=16, temperature=0.5,
                rounded=True, batch_size=1024,
            ),
            stage1=replace(stage, anchor_steps=6000),
            stage2=replace(stage, steps=500, sid_weight=0.9, generator_adversarial_weight=0.1),
        ),
        evaluation=EvaluationConfig(
            rows=20_000, teacher_steps="20 5 1", student_steps="1 2 4", teacher_rows=20_000,
            candidates=5, batch_size=512,
        ),
    )  # fmt: skip


def _grammar(task: str) -> Config:
    stage1 = StageConfig(
        steps=185,
        batch_size=64,
        micro_batch_size=64,
        mu=0.5,
        score_learning_rate=1e-3,
        generator_learning_rate=5e-4,
        score_warmup_steps=50,
        adversarial_warmup_steps=0,
        clip_value=0.0,
        clip_norm=1.0,
        ema_decay=0.98,
        validate_every=37,
        save_every=100,
    )
    return Config(
        preset=task,
        precision="auto",
        model=ModelConfig(
            seq_len=28 if task == "grammar" else 29,
            embedding_dim=32,
            time_dim=128,
            hidden_size=128,
            num_layers=4,
            num_heads=4,
            ffn_size=512,
            dropout=0.0,
            max_positions=32,
            norm="pre",
            normalize_embedding=True,
        ),
        data=DataConfig(task=task),
        teacher=replace(
            _ANCHORED_TEACHER,
            steps=450,
            batch_size=128,
            micro_batch_size=128,
            learning_rate=2e-3,
            warmup_steps=100,
            ema_decay=0.98,
            save_every=200,
            validate_every=225,
        ),
        distill=DistillConfig(
            selection_metric="balanced",
            validation_rows=128,
            diagnose_every=60,
            stage1=stage1,
            stage2=replace(stage1, steps=100, sid_weight=0.9, generator_adversarial_weight=0.1),
        ),
        evaluation=EvaluationConfig(rows=256, teacher_rows=256, candidates=8),
    )


PRESETS: dict[str, Config] = {
    "grammar": _grammar("grammar"),
    "grammar-templates": _grammar("grammar-templates"),
    "qqp": _qqp(),
    "quasar-t": _quasar_t(),
    "wiki-auto": _wiki_auto(),
    "qqp-small": _qqp_small(),
    "g2p": _g2p(),
}
