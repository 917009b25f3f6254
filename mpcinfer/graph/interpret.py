"""Evaluating a Program over shares: every party runs this, the tracer too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from mpcinfer.errors import InputError, MpcInferError, ShapeError, UnsupportedError
from mpcinfer.graph.program import Node, Program, Ref, references
from mpcinfer.nn import lookup
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.rerandomise import rerandomise
from mpcinfer.protocol.types import Public, Shared, Weight

# what a party holds of a model, by parameter and constant name
Holdings = Mapping[str, Shared | Weight | Public]


async def interpret(program: Program, ctx: Context, holdings: Holdings, inputs: Sequence[Shared]) -> list[Shared]:
    """Shares of the program's outputs, re-randomised. Values are dropped after their last use."""
    values: dict[str, Any] = dict(holdings)
    for declared, x in zip(program.inputs, inputs, strict=True):
        values[declared.name] = x
    uses = Counter(name for node in program.nodes for name in references(node))
    uses.update(r.name for r in program.results)
    for node in program.nodes:
        values[node.name] = await _evaluate(node, ctx, values)
        for name in references(node):
            uses[name] -= 1
            if not uses[name]:
                values.pop(name, None)
    outputs = []
    for i, result in enumerate(program.results):
        output = values[result.name]
        if not isinstance(output, Shared):
            raise UnsupportedError("an output of the model does not depend on its inputs")
        outputs.append(rerandomise(ctx.scope(f"output{i}"), output))
    return outputs


async def _evaluate(node: Node, ctx: Context, values: Mapping[str, Any]) -> Any:
    rule = lookup(node.op)
    if rule is None:
        raise UnsupportedError(f"operator {node.op} at {node.path or node.name} is not supported")
    args = [_resolve(x, values) for x in node.args]
    kwargs = {k: _resolve(x, values) for k, x in node.kwargs.items()}
    try:
        return await rule(ctx.scope(node.name), *args, **kwargs)
    except UnsupportedError as error:
        raise UnsupportedError(f"{node.op} at {node.path or node.name}: {error}") from error
    except MpcInferError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        raise ShapeError(f"{node.op} at {node.path or node.name}: the shapes do not fit") from error
    except Exception as error:  # arguments that no model of this operator's documentation has
        raise UnsupportedError(
            f"{node.op} at {node.path or node.name}: called in a way that is not supported"
        ) from error


def _resolve(x: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(x, Ref):
        return values[x.name]
    if isinstance(x, list | tuple):
        return [_resolve(item, values) for item in x]
    return x


def check_inputs(program: Program, shapes: Sequence[tuple[int, ...]]) -> None:
    """ShapeError unless the inputs' shapes fit the declarations, with one common batch size."""
    if len(shapes) != len(program.inputs):
        raise InputError(f"the model takes {len(program.inputs)} inputs, not {len(shapes)}")
    batch: set[int] = set()
    for declared, shape in zip(program.inputs, shapes, strict=True):
        fits = len(shape) == len(declared.shape) and all(
            want in (-1, got) and got > 0 for want, got in zip(declared.shape, shape, strict=True)
        )
        if not fits:
            wanted = ", ".join("batch" if s == -1 else str(s) for s in declared.shape)
            raise ShapeError(
                f"input {declared.name!r} has shape {list(shape)}, the model takes [{wanted}], every size at least 1"
            )
        batch |= {got for want, got in zip(declared.shape, shape, strict=True) if want == -1}
    if len(batch) > 1:
        raise ShapeError(f"the inputs have different batch sizes: {sorted(batch)}")
