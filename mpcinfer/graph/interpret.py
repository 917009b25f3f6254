"""Evaluating a Program over shares: every party runs this, the tracer too."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any

import torch

from mpcinfer.errors import MpcInferError, ShapeError, UnsupportedError
from mpcinfer.graph.flow import Flow
from mpcinfer.graph.lifted import Each, Lifted, apply, differing, lifted, of, secret, several
from mpcinfer.graph.program import Constant, Node, Program, Ref
from mpcinfer.graph.sizes import solve
from mpcinfer.nn import lookup, public
from mpcinfer.protocol.context import Context
from mpcinfer.protocol.rerandomise import rerandomise
from mpcinfer.protocol.types import Public, Shared, Weight

# what a party holds of a model, by parameter and constant name
Holdings = Mapping[str, Shared | Weight | Public]
EvaluateNode = Callable[[Node, Mapping[str, Any]], Coroutine[Any, Any, Any]]


async def interpret(program: Program, ctx: Context, holdings: Holdings, inputs: Sequence[Shared]) -> list[Shared]:
    """Shares of the program's outputs, re-randomised. Values are dropped after their last use."""
    values = {**holdings, **_named(program, inputs)}
    results = [r.name for r in program.results]
    found = await evaluated(program, results, values, lambda node, at: evaluate(node, ctx, at, program.frac_bits))
    return [released(ctx.scope(f"output{i}"), x) for i, x in enumerate(found)]


async def interpret_several(
    program: Program, ctx: Context, holdings: Holdings, requests: Sequence[Sequence[Shared]]
) -> list[list[Shared]]:
    """As `interpret`, for requests with inputs of the same shapes, in one run: the outputs of each."""
    if len(requests) == 1:
        return [await interpret(program, ctx, holdings, requests[0])]
    values = {**holdings, **_named(program, [lifted(own) for own in zip(*requests, strict=True)])}
    results = [r.name for r in program.results]
    found = await evaluated(program, results, values, lambda node, at: evaluate(node, ctx, at, program.frac_bits))
    outputs = [released_of_several(ctx.scope(f"output{i}"), x, len(requests)) for i, x in enumerate(found)]
    return [[x.of(i) for x in outputs] for i in range(len(requests))]


async def evaluated(
    program: Program, wanted: Sequence[str], values: Mapping[str, Any], evaluate_node: EvaluateNode
) -> list[Any]:
    """What the nodes called `wanted` yield; nodes that none of them needs are left out. See `Flow` for their order."""
    values, needed = dict(values), set(wanted)
    for node in reversed(program.nodes):
        if node.name in needed:
            needed.update(node.references)
    nodes = [node for node in program.nodes if node.name in needed]
    uses = Counter([name for node in nodes for name in node.references] + list(wanted))

    def finish(node: Node, value: Any) -> None:
        values[node.name] = value
        for name in node.references:
            uses[name] -= 1
            if not uses[name]:
                values.pop(name, None)

    await Flow(nodes, lambda node: evaluate_node(node, values), finish)
    return [values[name] for name in wanted]


def released(ctx: Context, output: Any) -> Shared:
    """An output as it may leave."""
    if not isinstance(output, Shared):
        raise UnsupportedError("an output of the model does not depend on its inputs")
    return rerandomise(ctx, output)


def released_of_several(ctx: Context, output: Any, count: int) -> Lifted:
    """Those of so many requests, each as it may leave."""
    if isinstance(output, Shared):  # the same for all
        output = Lifted(output.map(lambda t: t.expand(count, *t.shape)))
    return Lifted(released(ctx, output.value if isinstance(output, Lifted) else output))


def _named(program: Program, inputs: Sequence[Any]) -> dict[str, Any]:
    return {v.name: x for v, x in zip(program.inputs, inputs, strict=True)}


async def evaluate(node: Node, ctx: Context, values: Mapping[str, Any], frac_bits: int) -> Any:
    """What a node yields, given the values it refers to."""
    args = [_resolve(x, values) for x in node.args]
    kwargs = {k: _resolve(x, values) for k, x in node.kwargs.items()}
    try:
        return await _applied(node, ctx.scope(node.name), args, kwargs, frac_bits)
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


async def _applied(node: Node, ctx: Context, args: list[Any], kwargs: dict[str, Any], frac_bits: int) -> Any:
    """A node's operator, applied to these."""
    told = [*args, *kwargs.values()]
    if (count := differing(*told)) and not secret(*told):
        found = []
        for i in range(count):
            own = {name: of(x, i) for name, x in kwargs.items()}
            found.append(await _applied(node, ctx.scope(str(i)), of(args, i), own, frac_bits))
        return Each(found)
    rule = lookup(node.op)
    if public.applies(node.op, args):
        return public.evaluate(node.op, args, kwargs, frac_bits)
    if rule is None:
        raise UnsupportedError("this operator is not supported")
    if count or several(*told):
        return await apply(rule, node.op, ctx, args, kwargs)
    return await rule(ctx, *args, **kwargs)


def public_constant(constant: Constant) -> Public:
    """A public tensor of the program."""
    dtype = torch.bool if constant.boolean else torch.int64
    return Public(torch.tensor(constant.data, dtype=dtype).reshape(constant.shape), constant.frac_bits)


def _resolve(x: Any, values: Mapping[str, Any]) -> Any:
    if isinstance(x, Ref):
        return values[x.name]
    if isinstance(x, list | tuple):
        return [_resolve(item, values) for item in x]
    return x


def check_inputs(program: Program, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """What the program's free sizes are for inputs of these shapes; InputError, ShapeError if they do not fit."""
    return solve(program.sizes, [(v.name, v.shape) for v in program.inputs], shapes)
