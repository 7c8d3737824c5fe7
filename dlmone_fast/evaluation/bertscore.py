"""BERTScore F1 with a local model folder (Zhang et al., ICLR 2020; needs the extra `eval`).

As the bert_score package computes it without idf weights and baseline rescaling, which is how
DiffuSeq reports it. Not taken from torchmetrics: its batched form sorts both sides by their own
lengths and then compares texts of different pairs.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dlmone_fast.arguments import refuse_one
from dlmone_fast.checks import is_whole
from dlmone_fast.errors import BackendUnavailableError, ModelFileError, UsageError
from dlmone_fast.files import real_path

if TYPE_CHECKING:
    from torch import Tensor

    from dlmone_fast.evaluation.bootstrap import Floats

# Tokens beyond this are cut; the usual encoders know 512 positions.
MAX_TOKENS = 512


def refuse_layer_alone(model_dir: str | None, layer: int | None) -> None:
    """Refuse a hidden layer without a model that has it."""
    if layer is not None and model_dir is None:
        raise UsageError(
            f"bertscore_layer: {layer} belongs to bertscore_model, and none is given; name its "
            "folder, or leave the layer out."
        )


def bertscore_f1(
    hypotheses: Sequence[str],
    references: Sequence[str],
    model_dir: str,
    *,
    layer: int | None = None,
    batch_size: int = 64,
) -> Floats:
    """BERTScore F1 [n] per pair; 0 for an empty text.

    `model_dir` is a folder on this machine in the Hugging Face layout; nothing is downloaded.
    `layer` is the hidden layer compared (None: the last one). DiffuSeq's numbers are of
    microsoft/deberta-xlarge-mnli, for which the bert_score package takes layer 40.
    Raises `ModelFileError` for a folder without a model, `UsageError` for a layer that it does
    not have and `BackendUnavailableError` when the extra is not installed.
    """
    refuse_one("hypotheses", hypotheses)
    refuse_one("references", references)
    tokenizer, model = _load(str(real_path(model_dir)), model_dir)
    layers = model.config.num_hidden_layers
    if layer is not None and not is_whole(layer, 0, layers):
        raise UsageError(f"bertscore_layer: expected 0 to {layers} for this model, got {layer}.")
    scores = np.zeros(len(hypotheses))
    filled = [
        index
        for index, (hypothesis, reference) in enumerate(zip(hypotheses, references, strict=True))
        if hypothesis.split() and reference.split()
    ]
    # Pairs of like length share a batch, so that little of it is padding.
    filled.sort(key=lambda index: len(hypotheses[index]) + len(references[index]))
    for start in range(0, len(filled), batch_size):
        batch = filled[start : start + batch_size]
        scores[batch] = _batch_f1(
            [hypotheses[index] for index in batch],
            [references[index] for index in batch],
            tokenizer,
            model,
            layers if layer is None else layer,
        )
    return scores


# One model is kept: a report scores the candidates and both baselines with it.
@lru_cache(maxsize=1)
def _load(resolved: str, given: str) -> tuple[Any, Any]:
    if not os.path.isfile(Path(resolved, "config.json")):
        raise ModelFileError(
            f"bertscore_model: expected a local model folder with config.json, got {given!r}; "
            "download the model first and give its folder (names are never looked up online)."
        )
    try:
        import torch
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        raise BackendUnavailableError(
            f"bertscore_model: BERTScore needs transformers ({error}); install it with "
            "pip install 'dlmone_fast[eval]', or leave the option out."
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolved, local_files_only=True)
        model = AutoModel.from_pretrained(resolved, local_files_only=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise ModelFileError(
            f"bertscore_model: {given!r} cannot be loaded ({error}); download it again."
        ) from error
    return tokenizer, model.eval().to("cuda" if torch.cuda.is_available() else "cpu")


def _batch_f1(
    hypotheses: list[str], references: list[str], tokenizer: Any, model: Any, layer: int
) -> Floats:
    import torch

    def embed(texts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        encoded = tokenizer(
            texts,
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=min(tokenizer.model_max_length, MAX_TOKENS),
            return_special_tokens_mask=True,
        ).to(model.device)
        special = encoded.pop("special_tokens_mask")
        hidden = model(**encoded, output_hidden_states=True).hidden_states[layer]
        return hidden, encoded["attention_mask"].bool(), special == 0

    with torch.inference_mode():
        f1 = greedy_matching_f1(*embed(hypotheses), *embed(references))
    return f1.double().cpu().numpy()


def greedy_matching_f1(
    hypothesis: Tensor,
    hypothesis_mask: Tensor,
    hypothesis_words: Tensor,
    reference: Tensor,
    reference_mask: Tensor,
    reference_words: Tensor,
) -> Tensor:
    """F1 [B] of greedily matched token embeddings [B, L, d].

    The masks [B, L] are true on tokens. A token may match any token of the other side, [CLS]
    and [SEP] included; only those marked in the `words` masks [B, L] are averaged.
    """
    import torch.nn.functional as F

    similarity = F.normalize(hypothesis, dim=-1) @ F.normalize(reference, dim=-1).mT
    allowed = hypothesis_mask[:, :, None] & reference_mask[:, None, :]
    similarity = similarity.masked_fill(~allowed, -1.0)
    precision = _masked_mean(similarity.amax(dim=2), hypothesis_words)
    recall = _masked_mean(similarity.amax(dim=1), reference_words)
    return 2 * precision * recall / (precision + recall)


def _masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    return (values * mask).sum(dim=1) / mask.sum(dim=1)
