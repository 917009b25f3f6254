"""Operators that move elements and compute nothing: applied to the shares as they are, at no cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional

from mpcinfer.errors import UnsupportedError
from mpcinfer.nn.elementwise import encode
from mpcinfer.nn.registry import Rule, lookup, operator
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.types import Public, Shared

_MOVES = """
    view.default _unsafe_view.default permute.default transpose.int t.default
    squeeze.default squeeze.dim squeeze.dims unsqueeze.default expand.default repeat.default select.int slice.Tensor
    flip.default roll.default repeat_interleave.self_int
    alias.default detach.default pixel_shuffle.default diagonal.default
"""
_MANY = "split.Tensor split_with_sizes.default unbind.int"
_SAME = "clone.default _to_copy.default"


def per_axis(value: Any, dims: int) -> tuple[int, ...]:
    """A size that torch takes as one number for all axes or as one for each."""
    if isinstance(value, int):
        return (value,) * dims
    sizes = tuple(int(v) for v in value)
    return sizes * dims if len(sizes) == 1 else sizes


def common_shape(*shapes: tuple[int, ...]) -> tuple[int, ...]:
    """What operands of these shapes are broadcast to."""
    return tuple(torch.broadcast_shapes(*shapes))  # type: ignore[no-untyped-call]


def _aten(name: str) -> Any:
    packet, _, overload = name.partition(".")
    found = getattr(torch.ops.aten, packet, None)
    return getattr(found, overload, None) if found is not None else None


def _move(name: str) -> Rule:
    function = _aten(name)

    async def rule(ctx: Context, x: Shared, *args: Any, **kwargs: Any) -> Shared:
        return x.map(lambda t: _moved(function, t, *args, **kwargs))

    return rule


def _moved(function: Any, t: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    try:
        result: torch.Tensor = function(t, *args, **kwargs)
    except RuntimeError:  # a view of a layout that a float tensor had and ours has not
        result = function(t.contiguous(), *args, **kwargs)
    return result


def _split(name: str) -> Rule:
    function = _aten(name)

    async def rule(ctx: Context, x: Shared, *args: Any, **kwargs: Any) -> list[Shared]:
        return [Shared(part, x.frac_bits) for part in function(x.share, *args, **kwargs)]

    return rule


async def _same(ctx: Context, x: Any, *args: Any, **kwargs: Any) -> Any:
    return x


def moves(name: str) -> bool:
    """Whether the operator only moves elements."""
    return (
        lookup(name) is not None and name.removeprefix("aten.") in f"{_MOVES} {_MANY} {_SAME} _operator.getitem".split()
    )


for _name in _MOVES.split():
    if _aten(_name) is not None:
        operator(f"aten.{_name}", takes_integers=True)(_move(_name))
for _name in _MANY.split():
    if _aten(_name) is not None:
        operator(f"aten.{_name}", takes_integers=True)(_split(_name))
operator(*(f"aten.{name}" for name in _SAME.split()), takes_integers=True)(_same)


@operator("mpc.number", takes_integers=True)
async def number(ctx: Context, x: Shared, frac_bits: int) -> Shared:
    """A secret integer or truth value as a number at the model's scale: local."""
    return x.rescaled(frac_bits)


@operator("aten.cat.default", "aten.concat.default")
async def cat(ctx: Context, tensors: list[Any], dim: int = 0) -> Shared:
    """Concatenation of secrets and public tensors."""
    return _joined(ctx, tensors, lambda parts: torch.cat(parts, dim))


@operator("aten.stack.default")
async def stack(ctx: Context, tensors: list[Any], dim: int = 0) -> Shared:
    """Stacking along a new axis."""
    return _joined(ctx, tensors, lambda parts: torch.stack(parts, dim))


def _joined(ctx: Context, tensors: list[Any], join: Any) -> Shared:
    frac_bits = max(t.frac_bits for t in tensors)
    secret = next(t.share for t in tensors if isinstance(t, Shared))
    return Shared(join([_share(ctx, t, frac_bits).to(secret.device) for t in tensors]), frac_bits)


def _share(ctx: Context, x: Shared | Public, frac_bits: int) -> torch.Tensor:
    """This party's share at a scale: of a public tensor one party has all."""
    if isinstance(x, Shared):
        return x.rescaled(frac_bits).share
    value = x.value.to(torch.int64) << (frac_bits - x.frac_bits)
    return value if ctx.first else torch.zeros_like(value)


@operator("aten.constant_pad_nd.default", "aten.pad.default")
async def pad(
    ctx: Context, x: Shared, padding: list[int], *rest: Any, mode: str = "constant", value: Any = None
) -> Shared:
    """Padding with a public constant, or reflecting, replicating, wrapping around."""
    for extra in rest:  # constant_pad_nd has (pad, value), pad has (pad, mode, value)
        if isinstance(extra, str):
            mode = extra
        else:
            value = extra
    if mode != "constant":
        return x.map(lambda t: _indexed_pad(t, padding, mode))
    fill = encode(value or 0, x.frac_bits) if ctx.first else 0
    return x.map(lambda t: functional.pad(t, padding, value=fill))


def _indexed_pad(t: torch.Tensor, padding: list[int], mode: str) -> torch.Tensor:
    """torch pads integers in constant mode only; the other modes are gathers along each axis."""
    for i in range(len(padding) // 2):
        axis, (before, after), size = t.dim() - 1 - i, padding[2 * i : 2 * i + 2], t.shape[t.dim() - 1 - i]
        at = torch.arange(-before, size + after)
        if mode == "replicate":
            at = at.clamp(0, size - 1)
        elif mode == "circular":
            at = at % size
        elif mode == "reflect":
            at = (at.abs() % (2 * (size - 1))) if size > 1 else at * 0
            at = torch.minimum(at, 2 * (size - 1) - at) if size > 1 else at
        else:
            raise UnsupportedError(f"padding mode {mode!r}")
        t = t.index_select(axis, at.to(t.device))
    return t


def axes_of(dim: Any, rank: int) -> list[int]:
    """What operators call `dim`, one axis or several or None for all, as ascending numbers from 0."""
    return sorted(d % rank for d in ([dim] if isinstance(dim, int) else dim or range(rank)))


def rows(x: Shared, dim: Any) -> tuple[Shared, Callable[[Shared, bool], Shared]]:
    """The axes `dim` joined into a last one, and what gives a result of one number a row its shape (y, keepdim)."""
    rank, shape = len(x.shape), x.shape
    axes = axes_of(dim, rank)
    kept = [d for d in range(rank) if d not in axes]

    def place(y: Shared, keepdim: bool) -> Shared:
        sizes = [1 if d in axes else shape[d] for d in range(rank)] if keepdim else [shape[d] for d in kept]
        return y.map(lambda t: t.reshape(sizes))

    return x.map(lambda t: t.permute([*kept, *axes]).reshape([t.shape[d] for d in kept] + [-1])), place


@operator("aten.upsample_nearest1d.vec", "aten.upsample_nearest2d.vec")
async def upsample_nearest(ctx: Context, x: Shared, sizes: Any, factors: Any = None) -> Shared:
    """Every element as often as torch repeats it: its own rule says which index of each axis comes from which."""
    for i in range(len(sizes or factors)):
        axis = 2 + i
        indices = torch.arange(x.shape[axis], dtype=torch.float64).reshape(1, 1, -1)
        size, factor = (sizes[i], None) if sizes else (None, factors[i])
        at = functional.interpolate(indices, size=size, scale_factor=factor, mode="nearest").flatten().long()
        x = x.map(lambda t, axis=axis, at=at: t.index_select(axis, at.to(t.device)))  # type: ignore[misc]
    return x


@operator("aten.sym_size.int", takes_integers=True)
async def sym_size(ctx: Context, x: Any, dim: int) -> int:
    """A size: public."""
    return int(x.shape[dim])


@operator("_operator.getitem", takes_integers=True)
async def getitem(ctx: Context, values: list[Any], index: int) -> Any:
    """One of several results."""
    if index >= len(values):
        raise UnsupportedError("the second result of this operator (such as indices of a maximum) is not computed")
    return values[index]
