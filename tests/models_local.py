"""Running a captured model at all parties in one process, and comparing it with the model itself in float64."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn

from mpcinfer.graph.capture import Captured
from mpcinfer.graph.interpret import check_inputs, interpret
from mpcinfer.graph.plan import constants, mask_weights, plan_inference, plan_masks
from mpcinfer.graph.sizes import agrees, filled
from mpcinfer.protocol.local import LocalWorld, Transcript
from mpcinfer.protocol.types import Shared
from mpcinfer.ring.codec import FixedPoint

Holding = dict[str, Any]


def deploy_local(captured: Captured, parties: int, key: bytes = b"k" * 32) -> tuple[LocalWorld, list[Holding]]:
    """A world whose parties hold the model, its weights masked; checks what that opened against the plan."""
    world, program = LocalWorld(parties, key), captured.program
    declared = {p.name: p for p in program.parameters}
    assert set(captured.weights) == set(declared)
    assert all(tuple(captured.weights[n].shape) == p.shape for n, p in declared.items())
    shares = {name: world.share(x, declared[name].frac_bits) for name, x in captured.weights.items()}
    plain: list[Holding] = [{name: s[i] for name, s in shares.items()} for i in range(parties)]
    masked = world.run(lambda ctx, own: mask_weights(program, ctx, own), plain)
    _, cost = plan_masks(program, parties=parties, deployment="")
    assert (world.transcript.rounds, world.transcript.bytes_sent) == (cost.rounds, cost.bytes_sent)
    public = constants(program)
    return world, [{**plain[i], **{w.name: w for w in masked[i]}, **public} for i in range(parties)]


def run_local(
    captured: Captured, inputs: Sequence[torch.Tensor], parties: int, key: bytes = b"k" * 32
) -> tuple[list[torch.Tensor], Transcript]:
    """Outputs in float64 and the transcript of one request, which must cost and yield what was planned and declared."""
    program = captured.program
    world, holdings = deploy_local(captured, parties, key)
    world.transcript = Transcript()
    codec = FixedPoint(program.frac_bits)
    shares = [
        world.share(codec.encode(x), v.frac_bits) if v.frac_bits else world.share(x.to(torch.int64))
        for v, x in zip(program.inputs, inputs, strict=True)
    ]
    own = [[s[i] for s in shares] for i in range(parties)]
    outputs: list[list[Shared]] = world.run(
        lambda ctx, held, xs: interpret(program, ctx, held, xs), holdings, own, weights=holdings
    )

    seen = world.transcript
    free = check_inputs(program, [tuple(x.shape) for x in inputs])
    plan, cost, shapes = plan_inference(program, [tuple(x.shape) for x in inputs], parties=parties)
    assert (seen.rounds, seen.bytes_sent) == (cost.rounds, cost.bytes_sent)
    assert seen.dealer_bytes == plan.correction_bytes()
    assert shapes == [o.shape for o in outputs[0]]
    results = []
    for j, declared in enumerate(program.outputs):
        parts = [o[j] for o in outputs]
        assert all(p.frac_bits == declared.frac_bits for p in parts)
        assert agrees(filled(declared.shape, free), parts[0].shape)
        results.append(world.reveal(parts).to(torch.float64) / 2**declared.frac_bits)
    return results, seen


def plaintext(model: nn.Module, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """What the model itself computes, in float64."""
    with torch.no_grad():
        outputs = copy.deepcopy(model).double()(*(x.double() if x.is_floating_point() else x for x in inputs))
    return [x.double() for x in (outputs if isinstance(outputs, list | tuple) else [outputs])]


def assert_agrees(
    model: nn.Module,
    captured: Captured,
    inputs: Sequence[torch.Tensor],
    parties: int,
    ulps: float,
    names: Sequence[str] = (),
    exceptions: dict[str, float] | None = None,
) -> Transcript:
    """Every output is within `ulps` units in the last place of plaintext; `exceptions` allow named outputs more."""
    results, transcript = run_local(captured, inputs, parties)
    wanted = plaintext(model, inputs)
    assert len(results) == len(wanted)
    wrong = []
    for i, (got, want) in enumerate(zip(results, wanted, strict=True)):
        name = names[i] if names else str(i)
        if got.shape != want.shape:
            wrong.append(f"{name}: shape {list(got.shape)}, not {list(want.shape)}")
            continue
        error = float((got - want).abs().max()) * 2**captured.program.frac_bits if got.numel() else 0.0
        if not error <= (exceptions or {}).get(name, ulps):
            wrong.append(f"{name}: off by {error:.2f} ULP")
    assert not wrong, "; ".join(wrong)
    return transcript


def grid(*shape: int, frac_bits: int = 16, scale: float = 4.0, seed: int = 0) -> torch.Tensor:
    """Numbers in (-scale, scale) that fixed point holds exactly."""
    x = (torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1) * scale
    return torch.round(x * 2**frac_bits) / 2**frac_bits


def on_grid(model: nn.Module, frac_bits: int = 16, seed: int = 0) -> nn.Module:
    """The model in eval mode and float64, its parameters random numbers that fixed point holds exactly."""
    model = model.double().eval()
    with torch.no_grad():
        for i, p in enumerate(model.parameters()):
            p.copy_(grid(*p.shape, frac_bits=frac_bits, scale=1.0, seed=1000 * seed + i))
    return model


class Outputs(nn.Module):
    """A model with one output for each function, called with the module (for its parameters) and the inputs."""

    def __init__(self, functions: dict[str, Callable[..., Any]], **state: Any) -> None:
        super().__init__()
        self.functions = functions
        for name, x in state.items():
            if isinstance(x, nn.Parameter | nn.Module):
                setattr(self, name, x)
            else:
                self.register_buffer(name, x, persistent=False)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(f(self, *inputs) for f in self.functions.values())
