"""An encoder-decoder in PyTorch, and the same weights in CTranslate2.

Half of the layers read the prompt and half of them write the answer, as in translation. Weights
are random and made here; nothing is downloaded. PyTorch's network says what CTranslate2 has to
answer.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.generate.autoregressive import NEW_TOKENS, POSITIONS, WEIGHT_STD, Ids, without
from dlmone_fast.config import ModelConfig
from dlmone_fast.text_tokenizer import SPECIAL_TOKENS, TextTokenizer

_PAD, _UNK, _START, _END, _ = SPECIAL_TOKENS
_EPSILON = 1e-5


class EncoderDecoder(nn.Module):
    """Scores [B, T, V] of the tokens after each of `written`, given the prompts `read`."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config, width = config, config.hidden_size
        sizes: dict[str, Any] = {
            "d_model": width, "nhead": config.num_heads, "dim_feedforward": config.ffn_size,
            "dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True,
            "layer_norm_eps": _EPSILON,
        }  # fmt: skip
        depth = config.num_layers // 2
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.embedding = nn.Embedding(config.vocab_size, width)
            self.positions = nn.Embedding(POSITIONS, width)
            self.encoder = nn.TransformerEncoder(
                nn.TransformerEncoderLayer(**sizes), depth, nn.LayerNorm(width, _EPSILON),
                enable_nested_tensor=False,
            )  # fmt: skip
            self.decoder = nn.TransformerDecoder(
                nn.TransformerDecoderLayer(**sizes), depth, nn.LayerNorm(width, _EPSILON)
            )
            for parameter in self.parameters():
                if parameter.dim() > 1:
                    nn.init.normal_(parameter, std=WEIGHT_STD)
        self.eval().requires_grad_(False)

    def forward(self, read: Tensor, padding: Tensor, written: Tensor) -> Tensor:
        """`read` int64 [B, S] with bool `padding` [B, S], `written` int64 [B, T]."""
        causal = torch.ones(2 * written.shape[1:], dtype=torch.bool, device=read.device).triu(1)
        seen = self.encoder(self._embed(read), src_key_padding_mask=padding)
        hidden = self.decoder(
            self._embed(written), seen, tgt_mask=causal, memory_key_padding_mask=padding
        )
        return F.linear(hidden, self.embedding.weight)

    def _embed(self, ids: Tensor) -> Tensor:
        embedded: Tensor = self.embedding(ids) + self.positions.weight[: ids.shape[1]]
        return embedded


def export(model: EncoderDecoder, tokenizer: TextTokenizer, folder: Path) -> Path:
    """Write the weights as a CTranslate2 model and return its folder, a new one in `folder`."""
    import ctranslate2
    from ctranslate2.specs import TransformerSpec

    config = model.config
    depth = config.num_layers // 2
    spec = TransformerSpec.from_config(
        (depth, depth), config.num_heads, activation=ctranslate2.specs.Activation.GELU
    )
    table, places = _array(model.embedding.weight), _array(model.positions.weight)
    for stack, embeddings in (
        (spec.encoder, spec.encoder.embeddings[0]),
        (spec.decoder, spec.decoder.embeddings),
    ):
        stack.scale_embeddings = False
        embeddings.weight, stack.position_encodings.encodings = table, places
    spec.decoder.projection.weight = table
    for stack, module in ((spec.encoder, model.encoder), (spec.decoder, model.decoder)):
        _norm(stack.layer_norm, module.norm)
        for found, layer in zip(stack.layer, module.layers, strict=True):
            _layer(found, layer)
    tokens = list(tokenizer.vocabulary)
    spec.register_source_vocabulary(tokens)
    spec.register_target_vocabulary(tokens)
    spec.config.unk_token, spec.config.eos_token = _UNK, _END
    spec.config.bos_token = spec.config.decoder_start_token = _START
    spec.config.layer_norm_epsilon = _EPSILON
    spec.validate()
    spec.optimize()
    target = Path(tempfile.mkdtemp(dir=folder))
    spec.save(str(target))
    return target


def _layer(spec: Any, layer: Any) -> None:
    """One layer, whose norms are numbered in the order of use."""
    parts = [(spec.self_attention, layer.self_attn, layer.norm1)]
    if hasattr(layer, "multihead_attn"):
        parts.append((spec.attention, layer.multihead_attn, layer.norm2))
    for found, attention, norm in parts:
        _norm(found.layer_norm, norm)
        weight, bias = _array(attention.in_proj_weight), _array(attention.in_proj_bias)
        # Attention to itself has one product for query, key and value, the other one has two.
        cuts = [len(weight)] if len(found.linear) == 2 else [len(weight) // 3, len(weight)]
        for linear, first, last in zip(found.linear, [0, *cuts], cuts, strict=False):
            linear.weight, linear.bias = weight[first:last], bias[first:last]
        _linear(found.linear[-1], attention.out_proj)
    _norm(spec.ffn.layer_norm, layer.norm3 if len(parts) == 2 else layer.norm2)
    _linear(spec.ffn.linear_0, layer.linear1)
    _linear(spec.ffn.linear_1, layer.linear2)


def _linear(spec: Any, linear: nn.Linear) -> None:
    spec.weight, spec.bias = _array(linear.weight), _array(linear.bias)


def _norm(spec: Any, norm: Any) -> None:
    spec.gamma, spec.beta = _array(norm.weight), _array(norm.bias)


def _array(tensor: Tensor) -> Any:
    return tensor.detach().cpu().numpy()


class Translator:
    """Greedy generation by CTranslate2: prompts' ids to `NEW_TOKENS` ids each.

    Args:
        model: the same network in PyTorch, which `exact` asks.
        folder: what `export` wrote.
        compute_type: "float32", "int8" and so on, of CTranslate2.

    Attributes:
        library: CTranslate2's own object.
    """

    def __init__(
        self,
        model: EncoderDecoder,
        tokenizer: TextTokenizer,
        folder: Path,
        compute_type: str,
        device: torch.device,
    ) -> None:
        import ctranslate2

        self.network, self.tokenizer = model, tokenizer
        self._ids = {token: i for i, token in enumerate(tokenizer.vocabulary)}
        self.library = ctranslate2.Translator(
            str(folder), device=device.type, device_index=device.index or 0,
            compute_type=compute_type, inter_threads=1, intra_threads=torch.get_num_threads(),
        )  # fmt: skip

    def __call__(self, prompts: Ids) -> list[list[int]]:
        """The answers' ids."""
        found = self.library.translate_batch(
            self.tokens(prompts), beam_size=1,
            min_decoding_length=NEW_TOKENS, max_decoding_length=NEW_TOKENS,
        )  # fmt: skip
        return [[self._ids[token] for token in result.hypotheses[0]] for result in found]

    @torch.inference_mode()
    def exact(self, prompts: Ids, answers: Ids) -> Tensor:
        """fp32 scores [B, NEW_TOKENS, V] of each next token, by PyTorch in one pass."""
        width, device = max(map(len, prompts)), self.network.embedding.weight.device
        pad, start = self.tokenizer.pad_id, self.tokenizer.cls_id
        rows = torch.tensor([[*ids, *[pad] * (width - len(ids))] for ids in prompts])
        lengths = torch.tensor([len(ids) for ids in prompts])
        written = torch.tensor([[start, *ids[:-1]] for ids in answers])
        padding = torch.arange(width) >= lengths[:, None]
        scores = self.network(rows.to(device), padding.to(device), written.to(device))
        return without(self.tokenizer.sep_id, scores)

    def tokens(self, rows: Ids) -> list[list[str]]:
        """Ids as CTranslate2 takes them."""
        vocabulary = self.tokenizer.vocabulary
        return [[vocabulary[i] for i in ids] for ids in rows]
