"""Look-ups in tables: rows of a secret table by secret index, elements of secrets by public index."""

from __future__ import annotations

from typing import Any

import torch

from mpcinfer.errors import ShapeError, UnsupportedError
from mpcinfer.nn.registry import operator
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.lookup import one_hot, row_of
from mpcinfer.protocol.multiply import multiply
from mpcinfer.protocol.types import Public, Shared, Weight
from mpcinfer.ring.kernels import MATMUL


@operator("aten.embedding.default", takes_integers=True)
async def embedding(ctx: Context, table: Any, index: Any, *rest: Any, **options: Any) -> Shared:
    """table[index]: [V, d], [*S] -> [*S, d]. Exact. `padding_idx` and what else concerns training means nothing.

    By a public index: local. By a secret one, in [0, V): see `row_of`; an index outside selects zeros or another row.
    A table that was computed, and is no weight, is multiplied with `one_hot` of the index: 2 rounds. A party holds a
    few times 8 V bytes per index in memory.
    """
    if isinstance(index, Public):
        if not isinstance(table, Shared | Weight):
            raise UnsupportedError("a public table is indexed by public numbers only")
        return Shared(_gathered(table, [index]), table.frac_bits)
    if not isinstance(index, Shared) or index.frac_bits or not isinstance(table, Shared | Weight):
        raise UnsupportedError("a table is indexed by integers")
    if isinstance(table, Weight):
        return await row_of(ctx, index, table)
    return await multiply(ctx, await one_hot(ctx, index, table.shape[0]), table, MATMUL)


def _gathered(x: Shared | Weight, indices: list[Public | None]) -> torch.Tensor:
    """This party's share of x[indices], None for an axis that stays whole."""
    share, axis = x.share, 0
    at: list[torch.Tensor | None] = []
    for index in indices:
        if index is None:
            at.append(None)
            axis += 1
        elif index.value.dtype == torch.bool:  # as many axes as the mask has, and how many elements is public
            _in_range(index.value.shape == share.shape[axis : axis + index.value.dim()])
            at += [i.to(share.device) for i in index.value.nonzero(as_tuple=True)]
            axis += index.value.dim()
        else:
            at.append(_checked(index, share.shape[axis]).to(share.device))
            axis += 1
    gathered: torch.Tensor = torch.ops.aten.index.Tensor(share, at)
    return gathered


def _checked(index: Any, size: int) -> torch.Tensor:
    """A public index from 0 to size - 1. Tracing knows it too, so that nothing is dealt for one out of range."""
    if not isinstance(index, Public) or index.frac_bits or index.value.dtype == torch.bool:
        raise UnsupportedError("an index that is neither public nor looked up in a table of rows")
    at = torch.where(index.value < 0, index.value + size, index.value)
    _in_range(not at.numel() or 0 <= int(at.min()) <= int(at.max()) < size)
    return at


def _in_range(fits: bool) -> None:
    if not fits:
        raise ShapeError("a position is beyond the end of a table: the inputs are too long for this model")


@operator("aten.index_select.default")
async def index_select(ctx: Context, x: Shared, dim: int, index: Any) -> Shared:
    """x at public positions along one axis: local."""
    at = _checked(index, x.shape[dim])
    return x.map(lambda t: t.index_select(dim, at.to(t.device)))


@operator("aten.index.Tensor")
async def index_tensor(ctx: Context, x: Shared, indices: list[Any]) -> Shared:
    """x at public positions and by public masks, as indexing does it: local."""
    if any(not (i is None or isinstance(i, Public)) for i in indices):
        raise UnsupportedError("an index that is neither public nor looked up in a table of rows")
    return Shared(_gathered(x, indices), x.frac_bits)


@operator("aten.gather.default")
async def gather(ctx: Context, x: Shared, dim: int, index: Any, sparse_grad: bool = False) -> Shared:
    """x at one public position per element along an axis: local."""
    at = _checked(index, x.shape[dim])
    return x.map(lambda t: t.gather(dim, at.to(t.device)))
