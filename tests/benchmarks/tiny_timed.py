"""The sizes of a model that benchmarks can run on in tests."""

from __future__ import annotations

from dlmone_fast.config import ModelConfig

TINY = ModelConfig(
    seq_len=32, vocab_size=200, embedding_dim=32, time_dim=16, hidden_size=64, num_layers=2,
    num_heads=2, ffn_size=128, max_positions=32, normalize_embedding=True,
)  # fmt: skip
