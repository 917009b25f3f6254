"""Encoder transformers of the BERT family (BERT, RoBERTa, DistilBERT, MiniLM) as one module, with their task heads.

Written for `torch.export`: whole operators, any length up to the position table's, no mask (a sequence's length is
public, so nothing is padded) and no dropout. Ids are int64, [length] or [batch, length].
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "tanh": nn.Tanh,
}


@dataclass(frozen=True)
class EncoderConfig:
    """The sizes of an encoder; `activation` is a key of ACTIVATIONS, `eps` that of every LayerNorm."""

    vocabulary: int
    positions: int
    width: int
    layers: int
    heads: int
    hidden: int
    activation: str
    eps: float


class Attention(nn.Module):
    """Multi-head self-attention. The projections are one matrix, so that a private input is opened once for all."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., length, width] to the same shape."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(-2, -3) for part in self.qkv(x).chunk(3, -1))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        output: torch.Tensor = self.out(mixed.transpose(-2, -3).flatten(-2))
        return output


class Block(nn.Module):
    """One layer; normalised after each residual sum, as the original transformer is."""

    def __init__(self, config: EncoderConfig) -> None:
        super().__init__()
        self.attention = Attention(config.width, config.heads)
        self.attention_norm = nn.LayerNorm(config.width, config.eps)
        self.up = nn.Linear(config.width, config.hidden)
        self.activation = ACTIVATIONS[config.activation]()
        self.down = nn.Linear(config.hidden, config.width)
        self.norm = nn.LayerNorm(config.width, config.eps)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., length, width] to the same shape."""
        x = self.attention_norm(x + self.attention(x))
        output: torch.Tensor = self.norm(x + self.down(self.activation(self.up(x))))
        return output


class Encoder(nn.Module):
    """Ids [..., length], up to `positions` of them, to what `head` makes of the last hidden state [..., length, width].

    The position table holds everything that is added to a word's row whatever the word: where a checkpoint counts
    positions from an offset or adds the row of a token type, that is worked into the table.
    """

    def __init__(self, config: EncoderConfig, head: nn.Module) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocabulary, config.width)
        self.positions = nn.Parameter(torch.zeros(config.positions, config.width))
        self.norm = nn.LayerNorm(config.width, config.eps)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = head

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """What the head makes of the sequences `ids`, int64 [length] or [batch, length]."""
        x = self.norm(self.words(ids) + self.positions[: ids.shape[-1]])
        for block in self.blocks:
            x = block(x)
        output: torch.Tensor = self.head(x)
        return output


class SentenceEmbedding(nn.Module):
    """[..., length, width] to one vector [..., width]: the mean, or the first token's; of length 1 if `normalised`."""

    def __init__(self, pooling: str, normalised: bool) -> None:
        super().__init__()
        if pooling not in ("mean", "first"):
            raise ValueError(f"pooling is 'mean' or 'first', not {pooling!r}")
        self.pooling, self.normalised = pooling, normalised

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The embedding."""
        x = x.mean(-2) if self.pooling == "mean" else x.select(-2, 0)
        # One inverse square root costs less than a norm, a maximum and a division; the constant is for zeros.
        return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-12) if self.normalised else x


class SequenceClassifier(nn.Module):
    """[..., length, width] to logits [..., classes], from the first token."""

    def __init__(self, width: int, classes: int, activation: str) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.activation = ACTIVATIONS[activation]()
        self.output = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The logits."""
        logits: torch.Tensor = self.output(self.activation(self.dense(x.select(-2, 0))))
        return logits


class TokenClassifier(nn.Module):
    """[..., length, width] to logits [..., length, classes]."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.output = nn.Linear(width, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The logits."""
        logits: torch.Tensor = self.output(x)
        return logits


class SpanFinder(nn.Module):
    """[..., length, width] to logits [..., 2, length]: where an answer starts, and where it ends."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.output = nn.Linear(width, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The logits."""
        logits: torch.Tensor = self.output(x)
        return logits.transpose(-1, -2)


class WordPredictor(nn.Module):
    """[..., length, width] to logits [..., length, vocabulary]: which word stands, or stood, at each place."""

    def __init__(self, width: int, vocabulary: int, activation: str, eps: float) -> None:
        super().__init__()
        self.dense = nn.Linear(width, width)
        self.activation = ACTIVATIONS[activation]()
        self.norm = nn.LayerNorm(width, eps)
        self.output = nn.Linear(width, vocabulary)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The logits."""
        logits: torch.Tensor = self.output(self.norm(self.activation(self.dense(x))))
        return logits
