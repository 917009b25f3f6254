"""Decoder language models of the Llama and the GPT-2 style as one module, with the cache of keys and values explicit.

Written for `torch.export`: whole operators, any number of new and of cached positions, masks and positions computed
from sizes alone (these are public). One sequence at a time; no dropout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional

from mpcinfer.errors import InputError
from mpcinfer.models.encoder import ACTIVATIONS
from mpcinfer.models.loaded import InputSpec, Loaded, Sizes
from mpcinfer.models.rope import Rope
from mpcinfer.models.vocabulary import Vocabulary

_TOKENS_OF_EXAMPLE = 4  # so that export sees more than one new and more than one cached position


@dataclass(frozen=True)
class DecoderConfig:
    """What tells one decoder from another.

    context: the most positions, cached and new ones together. rope: None for a learned table of positions. norm: "rms"
    or "layer". gated: the MLP is down(activation(gate x) * up x) rather than down(activation(up x)); `activation` is a
    key of encoder.ACTIVATIONS. scale: what scores are multiplied with. windows: for each layer how many positions back
    it looks, its own included; 0 for all. head_norm: queries and keys are normalised head by head. tied: the matrix
    that makes logits is the table of embeddings. embedding_scale: what an embedding is multiplied with.
    """

    vocabulary: int
    context: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    activation: str
    eps: float
    rope: Rope | None
    norm: str
    gated: bool
    tied: bool
    scale: float
    windows: tuple[int, ...]
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_norm: bool = False
    embedding_scale: float = 1.0

    def checked(self) -> DecoderConfig:
        """Itself; InputError where the numbers contradict each other."""
        if self.heads % self.kv_heads or self.head_dim % 2 or min(self.head_dim, self.hidden) < 1 or self.eps < 0:
            raise InputError(
                f"the model's sizes contradict each other: {self.heads} heads, {self.kv_heads} of keys, of "
                f"{self.head_dim} dimensions, {self.hidden} hidden ones, epsilon {self.eps}"
            )
        return self

    def normalisation(self) -> nn.Module:
        """A fresh norm over the model's width."""
        return (nn.RMSNorm if self.norm == "rms" else nn.LayerNorm)(self.width, self.eps)


class Attention(nn.Module):
    """Self-attention of new positions on cached and new ones; several query heads may share a key head."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.head_dim, self.scale = config.head_dim, config.scale
        self.grouped = config.heads != config.kv_heads
        queries, keys = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = nn.Linear(config.width, queries, config.qkv_bias)
        self.k = nn.Linear(config.width, keys, config.qkv_bias)
        self.v = nn.Linear(config.width, keys, config.qkv_bias)
        self.out = nn.Linear(queries, config.width, config.out_bias)
        self.q_norm = nn.RMSNorm(config.head_dim, config.eps) if config.head_norm else nn.Identity()
        self.k_norm = nn.RMSNorm(config.head_dim, config.eps) if config.head_norm else nn.Identity()

    def forward(
        self,
        x: torch.Tensor,
        turn: torch.Tensor | None,
        mask: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        last: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[1, length, width] to the same shape, or with `last` to [1, 1, width], what the last position sees; and the
        caches with the new positions appended.
        """
        q, k, v = (layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.q, self.k, self.v))
        q, k, v = (each.transpose(1, 2) for each in (self.q_norm(q), self.k_norm(k), v))
        if turn is not None:
            both = rotate(torch.cat([q, k], 1), turn)
            q, k = both[:, : q.shape[1]], both[:, q.shape[1] :]
        keys, values = torch.cat([keys, k], dim=2), torch.cat([values, v], dim=2)
        if last:
            q, mask = q[:, :, -1:], mask[-1:]
        mixed = functional.scaled_dot_product_attention(
            q, keys, values, attn_mask=mask, scale=self.scale, enable_gqa=self.grouped
        )
        return self.out(mixed.transpose(1, 2).flatten(2)), keys, values


def rotate(x: torch.Tensor, turn: torch.Tensor) -> torch.Tensor:
    """[1, heads, length, head_dim] turned by rows [length, 2 head_dim] of `Rope.table`: one product in all."""
    first, second = x.chunk(2, -1)
    straight, crossed = (torch.cat([x, second, first], -1) * turn).chunk(2, -1)
    return straight + crossed


class Mlp(nn.Module):
    """Two layers, the first of which may be gated."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        if config.gated:
            self.gate = nn.Linear(config.width, config.hidden, config.mlp_bias)
        self.gated = config.gated
        self.up = nn.Linear(config.width, config.hidden, config.mlp_bias)
        self.activation = ACTIVATIONS[config.activation]()
        self.down = nn.Linear(config.hidden, config.width, config.mlp_bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., width] to the same shape."""
        hidden = self.activation(self.gate(x)) * self.up(x) if self.gated else self.activation(self.up(x))
        output: torch.Tensor = self.down(hidden)
        return output


class Block(nn.Module):
    """One layer; what goes into attention and MLP is normalised before."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.attention_norm = config.normalisation()
        self.attention = Attention(config)
        self.norm = config.normalisation()
        self.mlp = Mlp(config)

    def forward(
        self,
        x: torch.Tensor,
        turn: torch.Tensor | None,
        mask: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        last: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As Attention's."""
        mixed, keys, values = self.attention(self.attention_norm(x), turn, mask, keys, values, last)
        x = (x[:, -1:] if last else x) + mixed
        return x + self.mlp(self.norm(x)), keys, values


class Decoder(nn.Module):
    """Ids of new tokens, and what earlier calls left in the cache, to the logits of the token that comes next."""

    turn: torch.Tensor

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        if config.rope is None:
            self.positions = nn.Embedding(config.context, config.width)
        else:  # a table that everybody knows: not part of the state, so it is public
            self.register_buffer("turn", config.rope.table(config.context), persistent=False)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = config.normalisation()
        if not config.tied:
            self.head = nn.Linear(config.width, config.vocabulary, bias=False)

    def forward(self, ids: torch.Tensor, *caches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits [1, vocabulary] of the last position, and the caches with the new positions appended.

        ids: int64 [1, new]. caches: keys and values of each layer in turn, [1, kv_heads, cached, head_dim] each.
        """
        new, cached = ids.shape[1], caches[0].shape[2]
        positions = cached + torch.arange(new)
        masks = self._masks(positions, torch.arange(cached + new))
        x = self.embedding(ids)
        if self.config.embedding_scale != 1:
            x = x * self.config.embedding_scale
        turn = None
        if self.config.rope is None:
            x = x + self.positions(positions)
        else:
            turn = self.turn[positions]
        grown: list[torch.Tensor] = []
        for i, block in enumerate(self.blocks):
            mask = masks[self.config.windows[i]]
            # what other positions yield in the last layer nobody takes
            last = i == len(self.blocks) - 1
            x, keys, values = block(x, turn, mask, caches[2 * i], caches[2 * i + 1], last)
            grown += [keys, values]
        x = self.norm(x[:, -1])
        # a tied head is the very parameter, so that it is one secret
        logits = functional.linear(x, self.embedding.weight) if self.config.tied else self.head(x)
        return logits, *grown

    def _masks(self, positions: torch.Tensor, seen: torch.Tensor) -> Mapping[int, torch.Tensor]:
        """For each window, which position [new] may look at which [cached + new]."""
        causal = seen <= positions[:, None]
        return {
            window: causal & (seen > positions[:, None] - window) if window else causal
            for window in sorted(set(self.config.windows))
        }

    def empty_caches(self) -> tuple[torch.Tensor, ...]:
        """The caches before the first token."""
        shape = (1, self.config.kv_heads, 0, self.config.head_dim)
        return tuple(torch.zeros(shape) for _ in range(2 * self.config.layers))

    def example_inputs(self, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Arguments of `forward` for export, made of a real text's ids [length] or [1, length], four or more.

        The first third is in the cache and the rest is new, so that both have the values that the model makes of them,
        and sizes that export takes for free ones.
        """
        ids = ids.reshape(1, -1)
        if ids.shape[1] < _TOKENS_OF_EXAMPLE or ids.shape[1] > self.config.context:
            raise ValueError(f"an example has {_TOKENS_OF_EXAMPLE} to {self.config.context} ids, not {ids.shape[1]}")
        cached = max(2, ids.shape[1] // 3)
        with torch.no_grad():
            _, *caches = self(ids[:, :cached], *self.empty_caches())
        return ids[:, cached:], *caches

    def dynamic_shapes(self) -> tuple[Any, ...]:
        """For `torch.export.export` beside `example_inputs`: "new" ids and "cached" positions are free."""
        new, cached = Dim("new", min=1, max=self.config.context), Dim("cached", min=0, max=self.config.context)
        return {1: new}, tuple({2: cached} for _ in range(2 * self.config.layers))


def loaded_decoder(model: Decoder, kind: str, vocabulary: Vocabulary | None) -> Loaded:
    """The decoder with what it takes: new ids, and the caches."""
    config = model.config
    shape = (1, config.kv_heads, Sizes(0, config.context), config.head_dim)
    caches = (InputSpec(f"{what}{i}", "float", shape) for i in range(config.layers) for what in ("keys", "values"))
    ids = InputSpec("ids", "int", (1, Sizes(1, config.context)))
    return Loaded(model, (ids, *caches), kind, vocabulary=vocabulary, context=config.context)
