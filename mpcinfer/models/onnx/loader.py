"""Loading ONNX files: what is in one, whether all of it is supported, and which sizes its inputs have."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from mpcinfer.errors import InputError, UnsupportedError
from mpcinfer.models.loaded import InputSpec, Loaded, Sizes
from mpcinfer.models.onnx import axes, elementwise, moves, windows  # noqa: F401  (each registers its operators)
from mpcinfer.models.onnx.graph import Graph, GraphInput, Node, derived, read
from mpcinfer.models.onnx.module import OnnxModule, identifier
from mpcinfer.models.onnx.patterns import simplify
from mpcinfer.models.onnx.table import Operator, lookup

# of a first size that is free
BATCH = Sizes(1, 64)


def load(path: Path, inputs: Sequence[InputSpec] | None = None) -> Loaded:
    """The model in an ONNX file of opset 11 to 17; weights may lie in files beside it.

    inputs: sizes for inputs whose sizes the file leaves free, by name (other characters than letters, digits and _
    are written _). Without it a free first size is a batch of 1 to 64, and any other an InputError. UnsupportedError
    names every operator that is not supported with its node; InputError says what else is wrong with the file.
    """
    graph = read(path)
    specs = _specs(graph.inputs, inputs)
    simplify(graph)
    _refuse_unsupported(graph)
    module = OnnxModule(graph).eval()
    _try(module, specs)
    return Loaded(module, specs, f"ONNX, opset {graph.opset}" + (f", from {graph.producer}" if graph.producer else ""))


def _specs(declared: Sequence[GraphInput], given: Sequence[InputSpec] | None) -> tuple[InputSpec, ...]:
    """Every input with its sizes: those of the file, where it leaves them free those given."""
    wanted = {spec.name: spec for spec in given or ()}
    names = [identifier(i.name) for i in declared]
    unknown = sorted(set(wanted) - set(names))
    if unknown:
        raise InputError(f"the model has no input {', '.join(unknown)}; its inputs are {', '.join(names)}")
    return tuple(_spec(i, name, wanted.get(name)) for i, name in zip(declared, names, strict=True))


def _spec(declared: GraphInput, name: str, given: InputSpec | None) -> InputSpec:
    if given is None:
        free = [s for s in declared.shape[1:] if isinstance(s, str)]
        if free:
            sizes = ",".join(str(s) for s in declared.shape)
            raise InputError(
                f"input {name} has the shape [{sizes}], which leaves {', '.join(free)} free: "
                f"say --inputs '{name}:{declared.dtype}[...]' with a number or a range such as 1..256 for each size"
            )
        return InputSpec(name, declared.dtype, tuple(BATCH if isinstance(s, str) else s for s in declared.shape))
    fits = len(given.shape) == len(declared.shape) and all(
        isinstance(want, str) or want == got for want, got in zip(declared.shape, given.shape, strict=True)
    )
    if given.dtype != declared.dtype or not fits:
        sizes = ",".join(str(s) for s in declared.shape)
        raise InputError(f"input {name} is {declared.dtype}[{sizes}] in the file, which what was given for it is not")
    return given


def _refuse_unsupported(graph: Graph) -> None:
    """UnsupportedError with all operators that have no meaning here, or not with these arguments."""
    missing: dict[str, list[str]] = {}
    traced = derived(graph)
    for node in graph.nodes:
        if traced.intersection(node.outputs):
            continue
        operator = lookup(node.op, graph.opset)
        problem = node.op if operator is None else _misused(operator, node)
        if problem:
            missing.setdefault(problem, []).append(node.name)
    if missing:
        places = "; ".join(f"{op} at {', '.join(names)}" for op, names in sorted(missing.items()))
        raise UnsupportedError(f"the ONNX file has operators that are not supported: {places}")


def _misused(operator: Operator, node: Node) -> str | None:
    try:
        inspect.signature(operator.function).bind(*node.inputs, **node.attributes)
    except TypeError as error:
        return f"{node.op} ({error})"
    return None


def _try(module: nn.Module, specs: Sequence[InputSpec]) -> None:
    """One run on zeros of the smallest sizes: what refuses its arguments does so now."""
    examples = []
    for spec in specs:
        sizes = [s.low if isinstance(s, Sizes) else s for s in spec.shape]
        examples.append(torch.zeros(sizes, dtype=torch.float32 if spec.dtype == "float" else torch.int64))
    with torch.no_grad():
        module(*examples)
