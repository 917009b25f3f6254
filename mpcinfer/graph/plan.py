"""Observing a Program: what its dealer must deal and what it costs, before any data is there."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpcinfer.graph.interpret import Holdings, check_inputs, interpret, public_constant
from mpcinfer.graph.program import Program
from mpcinfer.protocol.context import Context, together
from mpcinfer.protocol.linear import mask_weight
from mpcinfer.protocol.tracing import Cost, Plan, trace
from mpcinfer.protocol.types import Public, Shared, Weight


def _meta(shape: Sequence[int]) -> torch.Tensor:
    return torch.empty(tuple(shape), dtype=torch.int64, device="meta")


def constants(program: Program) -> dict[str, Public]:
    """The program's public tensors."""
    return {c.name: public_constant(c) for c in program.constants}


def plan_inference(
    program: Program, shapes: Sequence[tuple[int, ...]], *, parties: int, deployment: str = ""
) -> tuple[Plan, Cost, list[tuple[int, ...]]]:
    """The plan of one request with inputs of these shapes, its online cost, and the outputs' shapes.

    Raises what the interpreter raises: UnsupportedError naming operator and module path, ShapeError.
    """
    check_inputs(program, shapes)
    # public numbers decide what is computed: which pairs a mask lets through, which rows of a table
    holdings: dict[str, Shared | Weight | Public] = {**constants(program)}
    for p in program.parameters:
        share = _meta(p.shape)
        holdings[p.name] = Weight(p.name, share, share, p.frac_bits) if p.weight else Shared(share, p.frac_bits)
    weights = {name: w for name, w in holdings.items() if isinstance(w, Weight)}
    inputs = [Shared(_meta(shape), v.frac_bits) for v, shape in zip(program.inputs, shapes, strict=True)]
    plan, cost, outputs = trace(
        lambda ctx: interpret(program, ctx, holdings, inputs), parties=parties, weights=weights, deployment=deployment
    )
    return plan, cost, [o.shape for o in outputs]


async def mask_weights(program: Program, ctx: Context, shares: Holdings) -> list[Weight]:
    """Open every weight's F = W + B in one message: what a deployment runs once per mesh session."""
    names = [p.name for p in program.parameters if p.weight]
    masked: list[Weight] = await together(*(_mask(ctx.scope(name), name, shares[name]) for name in names))
    return masked


async def _mask(ctx: Context, name: str, share: Shared | Weight | Public) -> Weight:
    if not isinstance(share, Shared):
        raise TypeError("a weight is masked once, from its share")
    return await mask_weight(ctx, name, share)


def plan_masks(program: Program, *, parties: int, deployment: str) -> tuple[Plan, Cost]:
    """The plan of `mask_weights`."""
    shares = {p.name: Shared(_meta(p.shape), p.frac_bits) for p in program.parameters}
    plan, cost, _ = trace(lambda ctx: mask_weights(program, ctx, shares), parties=parties, deployment=deployment)
    return plan, cost
