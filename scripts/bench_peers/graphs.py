"""The models that all systems evaluate, written once over a few operations; numpy only.

Runs in every peer's environment. A system gives an `Ops` with its own operations; `w` holds its private arrays by name,
the input `x` among them. Weights that x is multiplied with from the right are [in, out] and called `..._w`. Masks and
rotations are public numpy arrays. `NumpyOps`, in float64, is what results are compared with.

An `Ops` has, elementwise, + - and * (right operand private, a numpy array or a number), and what `NumpyOps` defines.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

MASKED = -50.0  # added to scores that do not count: exp of it is 0 to everybody


class Ops:
    """What is made of a system's operations, unless it has something better."""

    def linear(self, x: Any, w: Any, name: str) -> Any:
        """x times `name`_w, plus `name`_b if there is one."""
        y = self.mm(x, w[f"{name}_w"])
        return y + w[f"{name}_b"] if f"{name}_b" in w else y

    def layernorm(self, x: Any, w: Any, name: str, eps: float) -> Any:
        """Over the last dimension, with gain `name`_g and bias `name`_b."""
        centred = x - self.mean(x)
        return centred * self.rsqrt(self.mean(self.square(centred)) + eps) * w[f"{name}_g"] + w[f"{name}_b"]

    def rmsnorm(self, x: Any, w: Any, name: str, eps: float) -> Any:
        """Over the last dimension, with gain `name`_g."""
        return x * self.rsqrt(self.mean(self.square(x)) + eps) * w[f"{name}_g"]

    def attention(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        """Heads first; `mask`: what is added to the scores, or None."""
        scores = self.mm(q, self.transpose(k, (0, 2, 1))) * (1.0 / math.sqrt(q.shape[-1]))
        if mask is not None:
            scores = scores + np.broadcast_to(mask, scores.shape).copy()
        return self.mm(self.softmax(scores), v)


class TensorOps(Ops):
    """Of a system whose private tensors call things as torch does."""

    def mm(self, a: Any, b: Any) -> Any:
        """Matrix product, over equal leading dimensions."""
        return a.matmul(b)

    def mean(self, x: Any) -> Any:
        """Over the last dimension, which stays."""
        return x.mean(-1, keepdim=True)

    def square(self, x: Any) -> Any:
        """Elementwise."""
        return x.square()

    def rsqrt(self, x: Any) -> Any:
        """Of positive numbers."""
        return x.inv_sqrt()

    def softmax(self, x: Any) -> Any:
        """Over the last dimension."""
        return x.softmax(dim=-1)

    def reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        """Row by row."""
        return x.reshape(*shape)

    def transpose(self, x: Any, axes: tuple[int, ...]) -> Any:
        """In another order of the axes."""
        return x.permute(*axes)

    def take(self, x: Any, axis: int, start: int, stop: int) -> Any:
        """A part along an axis."""
        return x.narrow(axis, start, stop - start)


class NumpyOps(Ops):
    """Plaintext, in the precision of the arrays."""

    def mm(self, a: Any, b: Any) -> Any:
        """Matrix product, over equal leading dimensions."""
        return np.matmul(a, b)

    def mean(self, x: Any) -> Any:
        """Over the last dimension, which stays."""
        return x.mean(-1, keepdims=True)

    def square(self, x: Any) -> Any:
        """Elementwise."""
        return x * x

    def rsqrt(self, x: Any) -> Any:
        """Of positive numbers."""
        return 1.0 / np.sqrt(x)

    def softmax(self, x: Any) -> Any:
        """Over the last dimension."""
        e = np.exp(x - x.max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    def gelu(self, x: Any) -> Any:
        """The erf form."""
        return 0.5 * x * (1.0 + np.vectorize(math.erf)(x / math.sqrt(2.0)))

    def gelu_tanh(self, x: Any) -> Any:
        """The tanh form."""
        return 0.5 * x * (1.0 + np.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))

    def silu(self, x: Any) -> Any:
        """x times its sigmoid."""
        return x / (1.0 + np.exp(-x))

    def reshape(self, x: Any, shape: tuple[int, ...]) -> Any:
        """As numpy's."""
        return x.reshape(shape)

    def transpose(self, x: Any, axes: tuple[int, ...]) -> Any:
        """As numpy's."""
        return np.transpose(x, axes)

    def take(self, x: Any, axis: int, start: int, stop: int) -> Any:
        """A slice along an axis."""
        return x[(slice(None),) * axis + (slice(start, stop),)]

    def concatenate(self, parts: list[Any], axis: int) -> Any:
        """As numpy's."""
        return np.concatenate(parts, axis)


def _heads(o: Any, x: Any, heads: int) -> Any:
    """[rows, heads * width] to [heads, rows, width]."""
    rows, width = x.shape
    return o.transpose(o.reshape(x, (rows, heads, width // heads)), (1, 0, 2))


def _joined(o: Any, x: Any) -> Any:
    """The other way."""
    heads, rows, width = x.shape
    return o.reshape(o.transpose(x, (1, 0, 2)), (rows, heads * width))


def _causal(new: int, seen: int) -> Any:
    row, column = np.arange(seen - new, seen)[:, None], np.arange(seen)[None]
    return np.where(column <= row, 0.0, MASKED)


def _self_attention(o: Any, x: Any, w: Any, name: str, heads: int, mask: Any) -> Any:
    """Queries, keys and values from one matrix `name`qkv, the result through `name`o."""
    qkv, width = o.linear(x, w, f"{name}qkv"), x.shape[-1]
    q, k, v = (_heads(o, o.take(qkv, 1, i * width, (i + 1) * width), heads) for i in range(3))
    return o.linear(_joined(o, o.attention(q, k, v, mask)), w, f"{name}o")


def gpt2_block(o: Any, w: Any, heads: int) -> Any:
    """One block of GPT-2 on hidden states [rows, width]: norms first, causal, GELU in the tanh form."""
    x = w["x"]
    rows = x.shape[0]
    x = x + _self_attention(o, o.layernorm(x, w, "ln1", 1e-5), w, "", heads, _causal(rows, rows))
    return x + o.linear(o.gelu_tanh(o.linear(o.layernorm(x, w, "ln2", 1e-5), w, "up")), w, "down")


def bert(o: Any, w: Any, heads: int, layers: int) -> Any:
    """An encoder of BERT's kind on sums of embeddings [rows, width]: the mean of its last hidden states [width, 1]."""
    x = o.layernorm(w["x"], w, "ln", 1e-12)
    for i in range(layers):
        x = o.layernorm(x + _self_attention(o, x, w, f"{i}_", heads, None), w, f"{i}_ln1", 1e-12)
        x = o.layernorm(x + o.linear(o.gelu(o.linear(x, w, f"{i}_up")), w, f"{i}_down"), w, f"{i}_ln2", 1e-12)
    return o.mean(o.transpose(x, (1, 0)))


def _rotated(o: Any, x: Any, first: int, theta: float) -> Any:
    """Heads [heads, rows, width] turned by their positions, which begin with `first`."""
    heads, rows, width = x.shape
    half = width // 2
    angles = np.outer(np.arange(first, first + rows), theta ** (-np.arange(half) / half))
    cos, sin = (np.broadcast_to(f(angles), (heads, rows, half)).copy() for f in (np.cos, np.sin))
    a, b = o.take(x, 2, 0, half), o.take(x, 2, half, width)
    return o.concatenate([a * cos - b * sin, b * cos + a * sin], 2)


def llama(o: Any, w: Any, heads: int, kv_heads: int, layers: int, theta: float, eps: float, seen: int = 0) -> Any:
    """A decoder of Llama's kind on embeddings [rows, width], after `seen` others: the logits of the last row [1, V].

    Keys (turned already) and values of what was seen are `keys{layer}` and `values{layer}`, [kv_heads, seen, width].
    """
    x = w["x"]
    rows, group = x.shape[0], heads // kv_heads
    mask = np.tile(_causal(rows, seen + rows), (group, 1)) if rows > 1 else None
    for i in range(layers):
        h = o.rmsnorm(x, w, f"{i}_ln1", eps)
        q = _rotated(o, _heads(o, o.linear(h, w, f"{i}_q"), heads), seen, theta)
        k = _rotated(o, _heads(o, o.linear(h, w, f"{i}_k"), kv_heads), seen, theta)
        v = _heads(o, o.linear(h, w, f"{i}_v"), kv_heads)
        if seen:
            k, v = o.concatenate([w[f"keys{i}"], k], 1), o.concatenate([w[f"values{i}"], v], 1)
        # query heads that share keys are rows of one product
        mixed = o.attention(o.reshape(q, (kv_heads, group * rows, q.shape[2])), k, v, mask)
        x = x + o.linear(_joined(o, o.reshape(mixed, q.shape)), w, f"{i}_o")
        h = o.rmsnorm(x, w, f"{i}_ln2", eps)
        x = x + o.linear(o.silu(o.linear(h, w, f"{i}_gate")) * o.linear(h, w, f"{i}_up"), w, f"{i}_down")
    return o.linear(o.rmsnorm(o.take(x, 0, rows - 1, rows), w, "ln", eps), w, "head")


GRAPHS: dict[str, Any] = {"gpt2": gpt2_block, "bert": bert, "llama": llama}


def evaluate(graph: str, o: Any, w: Any, settings: dict[str, Any]) -> Any:
    """One of GRAPHS with its settings."""
    return GRAPHS[graph](o, w, **settings)
