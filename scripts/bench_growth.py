"""`scripts/bench growth`: how time and bytes grow with a text's length, the batch, and the number of parties.

Measured is a block of BERT-base with random weights. Its steps (norms, products, attention, activation) are priced one
by one as well, exactly, and compared with what the same step does in plaintext: multiply-adds, else elements.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from bench_cases import figures, reset_peaks
from bench_network import visited
from bench_ours import Ours, report
from bench_report import Row
from rich.console import Console
from torch import nn
from torch.export import Dim
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mpcinfer.client.price import price
from mpcinfer.graph.capture import Captured, capture
from mpcinfer.models.encoder import Block, EncoderConfig

SIZES: dict[str, tuple[int, ...]] = {
    "length": (16, 32, 64, 128, 256, 512),
    "batch": (1, 2, 4, 8, 16, 32, 64),
    "parties": (2, 3, 4, 5),
}
TINY: dict[str, tuple[int, ...]] = {"length": (8, 16), "batch": (1, 2), "parties": (2, 3)}
AXES = tuple(SIZES)
LENGTH = 16  # where length is not what varies; the batch is 1 then
TOLERANCE = 0.005  # largest error that is right


def run_growth(options: argparse.Namespace, say: Console) -> Row:
    """All sizes of all axes over every network: the report."""
    before = os.getloadavg()
    rows: list[Row] = []
    networks: dict[str, Row | None] = {}
    for place, network in visited(options.networks, networks):
        clusters: dict[int, list[tuple[str, int]]] = {}
        for axis in options.axes:
            for size in (TINY if options.tiny else SIZES)[axis]:
                clusters.setdefault(size if axis == "parties" else options.parties, []).append((axis, size))
        made = captured(block(options.tiny), max((TINY if options.tiny else SIZES)["length"]))
        for parties, points in clusters.items():
            with ExitStack() as stack:
                with say.status(f"{place}: starting a dealer and {parties} parties"):
                    ours = Ours(parties, stack, network)
                rows += _measured(ours, parties, made, points, options, say, place)
    rows.sort(key=lambda row: (options.networks.index(row["network"]), AXES.index(row["axis"]), row["size"]))
    settings = {"parties": options.parties, "repeat": options.repeat, "tiny": options.tiny, "axes": options.axes}
    return report(options, before, [], settings, networks, rows)


def block(tiny: bool = False) -> Block:
    """Random weights, always the same."""
    torch.manual_seed(3)
    width, heads, hidden = (16, 2, 32) if tiny else (768, 12, 3072)
    return Block(EncoderConfig(1, 1, width, 1, heads, hidden, "gelu", 1e-12)).eval().requires_grad_(False)


def captured(model: Block, longest: int) -> Captured:
    """For any batch and length."""
    x = torch.randn(2, longest, model.norm.normalized_shape[0], generator=torch.Generator().manual_seed(4))
    return capture(model, (x,), dynamic_shapes=({0: Dim("batch"), 1: Dim("length", min=2, max=max(longest, 4))},))


def _measured(
    ours: Ours,
    parties: int,
    made: Captured,
    points: list[tuple[str, int]],
    options: argparse.Namespace,
    say: Console,
    place: str,
) -> list[Row]:
    model, program = block(options.tiny), made.program
    reset_peaks(ours)
    began = time.perf_counter()
    ours.owner.upload(replace(made, weights=dict(made.weights)), name="bench")  # which takes the weights out
    deployed = time.perf_counter() - began
    rows: list[Row] = []
    for axis, size in points:
        batch, length = size if axis == "batch" else 1, size if axis == "length" else LENGTH
        x = torch.randn(batch, length, model.norm.normalized_shape[0], generator=torch.Generator().manual_seed(5))
        samples, output = [], x
        reset_peaks(ours)
        for turn in range(-1, options.repeat):
            with say.status(f"{place}: {axis} {size}, run {turn + 1} of {options.repeat}"):
                began = time.perf_counter()
                output = ours.client.infer("bench", x, timeout=3600)
                seconds = time.perf_counter() - began
            if turn >= 0:
                assert ours.client.last_cost is not None
                samples.append({"client": seconds, **ours.client.last_cost})
        with torch.no_grad():
            error = float((output.double() - model.double()(x.double())).abs().max())
        model.float()
        found = figures(ours, samples)
        rows.append(
            {
                "network": place,
                "axis": axis,
                "size": size,
                "name": f"{axis} {size}",
                "ours": found | {"deploy_seconds": deployed, "max_abs_error": error, "right": error <= TOLERANCE},
                "plain_seconds": _plain_seconds(model, x),
                "steps": steps(program, model, x, parties),
                "peers": {},
                "ratios": {},
            }
        )
        say.print(f"{place}, {axis} {size}: online {found['online']['seconds']:.3f} s")
    ours.owner.remove("bench")
    return rows


def _plain_seconds(model: nn.Module, x: torch.Tensor) -> float:
    """The block in plaintext, float32, on one thread."""
    taken = []
    with torch.no_grad():
        for _ in range(6):
            began = time.perf_counter()
            model(x)
            taken.append(time.perf_counter() - began)
    return statistics.median(taken[1:])


def steps(program: Any, model: nn.Module, x: torch.Tensor, parties: int) -> Row:
    """For each module: bytes a party sends to each other one, bytes of the dealer, and what plaintext does."""
    work = plain_work(model, x)
    found = {}
    for layer in price(program, [tuple(x.shape)], parties=parties).layers:
        if layer.path in work:
            sent = layer.price.online_bytes // (parties - 1)
            found[layer.path] = {"online": sent, "dealer": layer.price.offline_bytes, "plain": work[layer.path]}
    return found


def plain_work(model: nn.Module, x: torch.Tensor) -> dict[str, int]:
    """Multiply-adds of each module without its children, or where there are none the elements it makes."""
    elements: dict[str, int] = {}
    names = {module: name for name, module in model.named_modules()}
    hooks = [
        module.register_forward_hook(lambda m, _, y: elements.__setitem__(names[m], y.numel()))
        for module in names
        if module is not model
    ]
    # attention as the products it consists of, which are counted
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(x)
    for hook in hooks:
        hook.remove()
    root = type(model).__name__
    flops = {name: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}

    def own(name: str) -> int:
        children = [child for child in elements if child.rpartition(".")[0] == name]
        return flops.get(f"{root}.{name}", 0) - sum(flops.get(f"{root}.{child}", 0) for child in children)

    return {name: own(name) // 2 or count for name, count in elements.items()}
