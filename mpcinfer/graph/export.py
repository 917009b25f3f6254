"""torch.export of a model with the sizes of its inputs that are to stay free."""

from __future__ import annotations

import copy
import inspect
import operator
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.export import Dim, ExportedProgram, export
from torch.utils._pytree import tree_leaves

from mpcinfer.errors import InputError, UnsupportedError
from mpcinfer.graph.sizes import BATCH, ROWS, Size

# by axis, what torch.export calls a dimension: Dim objects, Dim.AUTO and so on
Axes = Mapping[int, Any]
# checks of sizes and dtypes that export adds; they compute nothing
_CHECKS = (
    "aten._assert_tensor_metadata.default",
    "aten._assert_scalar.default",
    "aten.sym_constrain_range_for_size.default",
    "aten.sym_constrain_range.default",
)


def exported_program(
    model: nn.Module | ExportedProgram, inputs: Sequence[torch.Tensor], dynamic_shapes: Any
) -> tuple[ExportedProgram, list[Axes]]:
    """The exported model without in-place operators and checks, and what is known of the free axes of each input.

    Without `dynamic_shapes` the batch size is free where the model allows it.
    """
    if isinstance(model, ExportedProgram):
        if dynamic_shapes is not None:
            raise InputError("an ExportedProgram has its dynamic shapes already; give them to torch.export")
        return _functional(model), []
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise InputError(f"{training[0]} is in training mode: call model.eval() before deploying")
    if isinstance(inputs, torch.Tensor) or not inputs or not all(isinstance(x, torch.Tensor) for x in inputs):
        raise InputError("example_inputs must be a sequence with one tensor per argument of the model")
    fixed: list[Axes] = [{} for _ in inputs]
    with torch.no_grad():
        free = _free_batch(model, inputs) if dynamic_shapes is None else _per_input(model, inputs, dynamic_shapes)
        if dynamic_shapes is None and free:
            try:
                return _export(model, inputs, free), free
            except Exception:  # of many types, when a model fixes its batch size: the next attempt says what else it is
                free = fixed
        try:
            return _export(model, inputs, free or fixed), free or fixed
        except Exception as error:
            raise UnsupportedError(
                "torch.export cannot capture this model; does it branch on values? "
                f"({type(error).__name__}: {_cause(error)})"
            ) from error


def _cause(error: Exception) -> str:
    """The first line of what export says, and the ranges that it suggests for free sizes."""
    first, _, rest = (str(error) or "no message").partition("\n")
    _, found, fixes = rest.partition("Suggested fixes:\n")
    fixes = "; ".join(line.strip() for line in fixes.partition("\n\n")[0].splitlines())
    return f"{first[:300]} Suggested: {fixes[:300]}" if found else first[:300]


def operator_name(target: Any) -> str:
    """What the registry calls an operator."""
    name = getattr(target, "__name__", "")
    return f"_operator.{name}" if name and getattr(operator, name, None) is target else str(target)


def free_size(symbol: Any, exported: ExportedProgram, dim: Any, number: int) -> Size:
    """The free size behind a symbol; `dim` is what the caller said of it, if anything."""
    found = exported.range_constraints[symbol]
    # export takes sizes of 0 and 1 for constants, and says 2 where it means any size
    low = dim.min if isinstance(dim, Dim) else 1 if found.lower <= 2 else int(found.lower)
    high = int(found.upper) if found.upper < 1 << 31 else 0
    name = dim.__name__ if isinstance(dim, Dim) else f"size{number}"
    return Size(name, max(1, low), high)


def _free_batch(model: nn.Module, inputs: Sequence[torch.Tensor]) -> list[Axes]:
    """The first size of every input as one free size, if they are the same.

    It is that of a batch, which may be cut, only if rows were seen not to influence each other.
    """
    sizes = {x.shape[0] if x.dim() else 0 for x in inputs}
    if len(sizes) > 1 or sizes == {0}:
        return []
    free = Dim(BATCH if _independent(model, inputs) else ROWS)
    return [{0: free} for _ in inputs]


def _independent(model: nn.Module, inputs: Sequence[torch.Tensor]) -> bool:
    """Whether two rows that differ yield together what each yields alone.

    Asked of copies of the model with the same parameters, since a model may keep something of what it has seen.
    """
    first = [x[:1].clone() for x in inputs]
    other = [x[-1:].flip(tuple(range(1, x.dim()))) for x in inputs]
    if all(map(torch.equal, first, other)):
        other = [_another(x) for x in first]

    def results(rows: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        return _tensors(copy.deepcopy(model, {id(p): p for p in model.parameters()})(*rows))

    try:
        together = results(map(torch.cat, zip(first, other, strict=True)))
        alone = [results(rows) for rows in (first, other)]  # which it may overwrite
    except Exception:  # of many types: then export says what the model takes
        return False
    return len({len(together), *map(len, alone)}) == 1 and all(
        whole.dim() > 0
        and whole.shape[0] == 2
        and all(one.shape == whole[i : i + 1].shape for i, one in enumerate(each))
        and _alike(whole, torch.cat(each))
        for whole, *each in zip(together, *alone, strict=True)
    )


def _another(x: torch.Tensor) -> torch.Tensor:
    """A row of the same kind with another value everywhere."""
    if x.is_floating_point():
        return 0.5 * x + torch.linspace(0.5, 1, x.numel(), dtype=x.dtype).reshape(x.shape)
    return (x == 0).to(x.dtype)


def _alike(x: torch.Tensor, y: torch.Tensor) -> bool:
    if not x.is_floating_point():
        return torch.equal(x, y)
    return torch.allclose(x.double(), y.double(), rtol=1e-3, atol=1e-4, equal_nan=True)


def _tensors(outputs: Any) -> list[torch.Tensor]:
    return [each for each in tree_leaves(outputs) if isinstance(each, torch.Tensor)]


def _per_input(model: nn.Module, inputs: Sequence[torch.Tensor], dynamic_shapes: Any) -> list[Axes]:
    """`dynamic_shapes` in any form that torch.export takes, for one tensor after the other."""
    bound = _bound(model, inputs)
    if isinstance(dynamic_shapes, Mapping):
        specs = dict(dynamic_shapes)
    elif isinstance(dynamic_shapes, list | tuple) and len(dynamic_shapes) == len(bound):
        specs = dict(zip(bound, dynamic_shapes, strict=True))
    else:
        raise InputError("dynamic_shapes must have one entry for each argument of the model")
    if set(specs) != set(bound):
        raise InputError(f"dynamic_shapes must name the arguments of the model: {', '.join(bound)}")
    axes: list[Axes] = []
    for name, value in bound.items():
        parts = list(specs[name] or [None] * len(value)) if isinstance(value, tuple) else [specs[name]]
        for part in parts:
            pairs = part.items() if isinstance(part, Mapping) else enumerate(part or ())
            axes.append({axis: dim for axis, dim in pairs if dim is not None})
    if len(axes) != len(inputs):
        raise InputError("dynamic_shapes must have one entry for each argument of the model")
    return axes


def _bound(model: nn.Module, inputs: Sequence[torch.Tensor]) -> dict[str, Any]:
    """The inputs by the names of `forward`'s arguments."""
    try:
        return dict(inspect.signature(model.forward).bind(*inputs).arguments)
    except TypeError as error:
        raise UnsupportedError(f"torch.export cannot capture this model: {error}") from error


def _export(model: nn.Module, inputs: Sequence[torch.Tensor], free: Sequence[Axes]) -> ExportedProgram:
    # export takes two uses of one tensor for one input, and a size of 1 for a constant; hence the copies
    examples = tuple(
        x.repeat([2 if x.shape[i] == 1 and isinstance(axes.get(i), _FREE) else 1 for i in range(x.dim())])
        for x, axes in zip(inputs, free, strict=True)
    )
    dynamic_shapes: dict[str, Any] | None = None
    if any(free):
        remaining = iter(free)
        dynamic_shapes = {
            name: tuple(dict(next(remaining)) for _ in x) if isinstance(x, tuple) else dict(next(remaining))
            for name, x in _bound(model, examples).items()
        }
    with warnings.catch_warnings():
        # torch 2.13 warns of a class that it uses itself
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        exported: ExportedProgram = export(model, examples, dynamic_shapes=dynamic_shapes)
    return _functional(exported)


_FREE = (Dim, type(Dim.AUTO))


def _functional(exported: ExportedProgram) -> ExportedProgram:
    """Without in-place operators, checks, and code whose results nobody uses; a new object."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        functional: ExportedProgram = exported.run_decompositions({})
    for node in list(functional.graph.nodes):
        if str(node.target) in _CHECKS:
            functional.graph.erase_node(node)
    functional.graph.eliminate_dead_code()
    return functional
