"""Sums that are truncated once: fewer rounds and bytes, the same numbers, and never where there is no room."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from mpcinfer.graph import postpone
from mpcinfer.graph.capture import Captured, capture
from mpcinfer.graph.plan import Planner, plan_inference
from mpcinfer.graph.program import Program
from mpcinfer.nn.sampling import Choice
from tests.decoders_local import (
    GREEDY,
    VOCABULARY,
    LocalText,
    captured_decoder,
    decoder,
    plain_logits,
    token_ids,
)
from tests.models_local import on_grid, plaintext, run_local

SIZE = 8


class Block(nn.Module):
    """Two residual branches, as a transformer's layer has them."""

    def __init__(self, norm: type[nn.Module], size: int = SIZE) -> None:
        super().__init__()
        self.norms = nn.ModuleList(norm(size) for _ in range(2))
        self.layers = nn.ModuleList(nn.Linear(size, size) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x))
        return x


class PostNorm(Block):
    """As in BERT."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = norm(x + layer(x))
        return x


class Branching(Block):
    """What is added is used by itself, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.layers[0](self.norms[0](x))
        return self.norms[1](x + y) * y


def captured(model: nn.Module, size: int = SIZE) -> tuple[Captured, torch.Tensor]:
    x = torch.round(torch.randn(3, size, generator=torch.Generator().manual_seed(2)).double() * 2**16) / 2**16
    return capture(on_grid(model), [x]), x


def marked(program: Program) -> list[str]:
    return [node.op for node in program.nodes if {"wide", "frac_bits"} & node.kwargs.keys()]


LINEAR, ADD = "mpc.linear", "aten.add.Tensor"
LAYER, RMS = "aten.layer_norm.default", "aten.rms_norm.default"


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        (nn.Sequential(Block(nn.LayerNorm), Block(nn.LayerNorm)), [LINEAR, ADD, LAYER] * 3 + [LINEAR, ADD]),
        (Block(nn.RMSNorm), [LINEAR, RMS, LINEAR, ADD]),
        (PostNorm(nn.LayerNorm), [LINEAR, LAYER] * 2),
    ],
    ids=["layer", "rms", "post"],
)
def test_residual_streams(model: nn.Module, expected: list[str], parties: int, monkeypatch: pytest.MonkeyPatch) -> None:
    ours, x = captured(model)
    found = marked(ours.program)
    assert [op for op in found if op != ADD] == [op for op in expected if op != ADD]
    (got,), run = run_local(ours, [x], parties)
    assert float((got - plaintext(on_grid(model), [x])[0]).abs().max()) < 2e-3
    monkeypatch.setattr("mpcinfer.graph.bounds.postpone_truncations", lambda program, largest: program)
    plain, _ = captured(model)
    _, before, _ = plan_inference(plain.program, [tuple(x.shape)], parties=parties)
    wide = sum(op == LINEAR for op in found)
    ended = sum(n.op == ADD and "frac_bits" in n.kwargs for n in ours.program.nodes)
    assert run.rounds == before.rounds - wide + ended
    assert run.bytes_sent == before.bytes_sent - 8 * x.numel() * (wide - ended) * (parties - 1)


class LastRow(Block):
    """A norm of some rows of the sum, as before the head of a language model."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = super().forward(x)[-1]
        return self.norms[0](y) if self.only else self.norms[0](y) + y.relu()

    only = True


def test_rows_of_a_sum(parties: int) -> None:
    model = LastRow(nn.RMSNorm)
    ours, x = captured(model)
    assert marked(ours.program) == [LINEAR, RMS, LINEAR, RMS]  # the sums in between are wide by themselves
    (got,), _ = run_local(ours, [x], parties)
    assert float((got - plaintext(model, [x])[0]).abs().max()) < 2e-3
    model.only = False
    ours, _ = captured(model)
    assert marked(ours.program) == [LINEAR, RMS, LINEAR, ADD]


def test_what_is_used_otherwise_is_truncated() -> None:
    ours, _ = captured(Branching(nn.LayerNorm))
    assert not marked(ours.program)


def test_rows_for_whose_mean_there_is_no_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postpone, "_CENTRED_BITS", -100)
    ours, _ = captured(PostNorm(nn.LayerNorm))
    assert marked(ours.program) == [LINEAR, ADD] * 2  # the sum is truncated before the norm
    ours, _ = captured(Block(nn.RMSNorm))
    assert RMS in marked(ours.program)


@pytest.mark.parametrize("norm", [nn.LayerNorm, nn.RMSNorm])
def test_large_numbers(norm: type[nn.Module]) -> None:
    """As large as rows of squares may be: what is twice as fine must still fit."""
    model = Block(norm, 64)
    with torch.no_grad():
        for layer in model.layers:
            layer.weight.mul_(50)
            layer.bias.mul_(4000)
    ours, x = captured(model, 64)
    (got,), _ = run_local(ours, [x], 2)
    want = plaintext(on_grid(model), [x])[0]
    assert float((got - want).abs().max()) < 2e-5 * float(want.abs().max()) + 2e-3


class Turning(nn.Module):
    """Two linear layers of a normalised input, one of which is turned as by rotary position embeddings."""

    table: torch.Tensor

    def __init__(self, growing: bool = False) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(SIZE)
        self.turned, self.plain = nn.Linear(SIZE, SIZE), nn.Linear(SIZE, SIZE)
        self.growing = growing
        self.register_buffer("table", torch.linspace(-1, 1, 2 * SIZE), persistent=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = self.norm(x)
        y = self.turned(x).reshape(-1, 1, SIZE)
        if self.growing:
            y = y.expand(-1, 2, -1)
        first, second = y.chunk(2, -1)
        straight, crossed = (torch.cat([y, second, first], -1) * self.table).chunk(2, -1)
        return (straight + crossed).relu(), self.plain(x).relu()


ERROR = 5e-4  # of the norm, mostly
WIDE = [LINEAR, "mpc.narrow", "aten.mul.Tensor", "mpc.narrow"]


def widened(program: Program) -> list[str]:
    return [node.op for node in program.nodes if "wide" in node.kwargs or node.op == "mpc.narrow"]


def test_products_with_public_numbers(parties: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is turned is truncated once, after that, and what is not when it always was."""
    model = Turning()
    ours, x = captured(model)
    assert sorted(widened(ours.program)) == sorted(WIDE)
    got, run = run_local(ours, [x], parties)
    for mine, theirs in zip(got, plaintext(on_grid(model), [x]), strict=True):
        assert float((mine - theirs).abs().max()) < ERROR
    monkeypatch.setattr("mpcinfer.graph.bounds.postpone_truncations", lambda program, largest: program)
    plain, _ = captured(model)
    _, before, _ = plan_inference(plain.program, [tuple(x.shape)], parties=parties)
    # without: 2 x linear and 2 x product; with: the sum and the other linear layer
    assert run.rounds == before.rounds - 1
    assert run.bytes_sent == before.bytes_sent - 8 * 2 * x.numel() * (parties - 1)


@pytest.mark.parametrize(("factor", "expected"), [(0.99, WIDE), (1.01, [])])
def test_room_for_products(factor: float, expected: list[str]) -> None:
    """48 fraction bits leave numbers below 2^14, headroom included."""
    ours, _ = captured(Turning())
    unmarked = [replace(n, kwargs={k: v for k, v in n.kwargs.items() if k != "wide"}) for n in ours.program.nodes]
    names = {n.name: n.args[0] for n in unmarked if n.op == "mpc.narrow"}
    nodes = tuple(
        postpone._referring(n, {a: b.name for a, b in names.items()}) for n in unmarked if n.name not in names
    )
    program = replace(ours.program, nodes=nodes)
    assert not widened(program)
    again = postpone.postpone_truncations(program, {n.name: factor * 2.0**14 for n in nodes})
    assert sorted(widened(again)) == sorted(expected)


def test_large_turned_numbers() -> None:
    """Where there is no room for the product, nothing is postponed, and numbers are right all the same."""
    model = on_grid(Turning())
    with torch.no_grad():
        model.get_parameter("turned.weight").mul_(1 << 12)
    x = captured(Turning())[1]
    ours = capture(model, [x])
    assert not widened(ours.program)
    got, _ = run_local(ours, [x], 2)
    for mine, theirs in zip(got, plaintext(model, [x]), strict=True):
        assert float((mine - theirs).abs().max()) < ERROR * 2**12


def test_what_grows_or_is_not_all_public_is_truncated_before() -> None:
    assert not widened(captured(Turning(growing=True))[0].program)

    class Secret(Turning):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return (self.turned(x) * self.plain(x)).relu(), (self.turned(x) + x).relu()

    assert not widened(captured(Secret())[0].program)


def test_logits_of_which_a_token_is_chosen(parties: int) -> None:
    """They are compared as they come out of the last layer; what changes them truncates them first."""
    model, logits = decoder()
    tokens = captured_decoder(model, "tokens")
    (result,) = tokens.program.results
    assert [node.name for node in tokens.program.nodes if "wide" in node.kwargs][-1] == result.name
    ids = token_ids(6)
    for choice, penalty in ((GREEDY, 1.0), (Choice.of(0.0, 0, 2.0), 2.0)):
        text = LocalText(tokens, parties)
        (output,) = zip(*(done.outputs for done in text.take_in(ids, choice)), strict=True)
        expected = plain_logits(model, ids)
        expected[ids] = torch.where(expected > 0, expected / penalty, expected * penalty)[ids]
        assert float(expected.max() - expected[int(text.world.reveal(output))]) < 2e-3
        _, cost, _ = Planner(tokens.program, parties=parties).step(6, 32, choice, 6)
        _, before, _ = Planner(logits.program, parties=parties).step(6, 32, choice, 6)
        saved = choice == GREEDY
        assert before.rounds - cost.rounds == saved
        assert before.bytes_sent - cost.bytes_sent == 8 * VOCABULARY * saved * (parties - 1)


@pytest.mark.parametrize(("largest", "wide"), [(0.99, True), (1.0, False)])
def test_logits_that_are_too_large_to_be_compared(largest: float, wide: bool) -> None:
    """A difference of two, with 32 fraction bits, is below 2^47."""
    program = replace(decoder()[1].program, reveal="tokens")
    name = program.results[0].name
    found = postpone.postpone_truncations(program, {name: largest * 2.0**14}).nodes
    assert ("wide" in next(node.kwargs for node in found if node.name == name)) == wide
    assert not any("wide" in node.kwargs for node in program.nodes if node.name == name)


@pytest.mark.parametrize(
    ("frac_bits", "size", "largest", "wide"),
    [(24, 1024, 240.0, False), (20, 1024, 3500.0, False), (16, 1024, 3500.0, True)],
)
def test_centred_rows_that_have_no_room_for_twice_the_bits(
    frac_bits: int, size: int, largest: float, wide: bool
) -> None:
    """One number of a row far above the others: n x - sum(x) must fit with all its fraction bits."""

    class Outlier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.norm, self.last = nn.Linear(4, size), nn.LayerNorm(size), nn.Linear(size, 2)
            self.layer.weight.data.mul_(0.1)
            self.layer.weight.data[0] = torch.tensor([largest, 0, 0, 0])

        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return self.last(self.norm(self.layer(x) + y))

    torch.manual_seed(5)
    model = Outlier().double().eval()
    inputs = [
        torch.round(v * 2**frac_bits) / 2**frac_bits for v in (torch.ones(1, 4).double(), torch.randn(1, size).double())
    ]
    ours = capture(model, inputs, frac_bits=frac_bits)
    assert any(node.op == LAYER and "frac_bits" in node.kwargs for node in ours.program.nodes) == wide
    (got,), _ = run_local(ours, inputs, 2)
    assert float((got - plaintext(model, inputs)[0]).abs().max()) < 0.05
