"""Which inputs of an exported model are caches: rows that the parties keep from one step to the next."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx
from torch.export import ExportedProgram

from mpcinfer.errors import UnsupportedError
from mpcinfer.graph.export import Axes, free_size, operator_name
from mpcinfer.graph.program import Cache
from mpcinfer.nn import public

Taken = tuple[str, torch.Tensor]


def without_caches(
    exported: ExportedProgram, taken: Sequence[Taken], axes: Sequence[Axes], frac_bits: int
) -> tuple[list[tuple[str, torch.Tensor, Axes]], list[Cache]]:
    """The inputs that are no caches, with what is known of their axes, and those that are.

    A cache is an input with a free number of rows to which the model appends, and does no more with it, and whose
    longer version it returns. UnsupportedError for one with a fixed number of rows, or without a largest one.
    """
    returned = {spec.arg.name for spec in exported.graph_signature.output_specs}
    placeholders = {n.name: n for n in exported.graph.nodes if n.op == "placeholder"}
    others: list[tuple[str, torch.Tensor, Axes]] = []
    caches: list[Cache] = []
    for (name, meta), dims in zip(taken, axes, strict=True):
        used = [n for n in placeholders[name].users if not public.sizes_only(operator_name(n.target))]
        if len(used) != 1 or not _appends(used[0], name) or used[0].name not in returned:
            others.append((name, meta, dims))
            continue
        size = meta.shape[-2]
        if not isinstance(size, torch.SymInt):
            raise UnsupportedError(f"input {name!r} is a cache with a fixed number of rows; make it dynamic")
        rows = free_size(size.node.expr, exported, dims.get(meta.dim() - 2), 0).high
        if not rows:
            raise UnsupportedError(f"cache {name!r} may grow without end: give its Dim a largest size")
        shape = (*map(int, meta.shape[:-2]), 0, int(meta.shape[-1]))
        caches.append(Cache(name, shape, frac_bits, used[0].name, rows))
    return others, caches


def _appends(node: fx.Node, name: str) -> bool:
    """Whether a node appends rows, along the last axis but one, to the tensor called `name`."""
    parts = node.args[0] if node.args else None
    if not (str(node.target) == "aten.cat.default" and isinstance(parts, list | tuple) and len(parts) == 2):
        return False
    rows = node.meta["val"].dim() - 2
    cache, more = parts
    is_first = isinstance(cache, fx.Node) and cache.name == name
    return is_first and isinstance(more, fx.Node) and more is not cache and node.args[1:] in ((-2,), (rows,))
