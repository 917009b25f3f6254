"""Running programs: real networks on real digits, inputs that don't fit, and costs that depend on shapes alone."""

from __future__ import annotations

import pytest
import torch

from mpcinfer.errors import InputError, ShapeError, UnsupportedError
from mpcinfer.graph.capture import capture
from mpcinfer.graph.interpret import check_inputs, interpret
from mpcinfer.graph.plan import plan_inference
from mpcinfer.graph.program import Input, Node, Program, Ref, Value
from mpcinfer.graph.sizes import Size
from mpcinfer.protocol.local import LocalWorld
from tests.graph.conftest import Case, Digits
from tests.models_local import deploy_local, plaintext, run_local

NEAR_TIE = 0.01
MAX_ERROR = 0.005


@pytest.mark.parametrize("network", ["mlp", "cnn"])
def test_digits_agree_with_plaintext(digits: Digits, network: str, parties: int) -> None:
    model = getattr(digits, network)
    captured = capture(model, [digits.images[:1]])
    (want,) = plaintext(model, [digits.images])
    (got,), _ = run_local(captured, [digits.images], parties)
    assert len(got) >= 200
    assert float((got - want).abs().max()) <= MAX_ERROR
    best = want.topk(2).values
    clear = best[:, 0] - best[:, 1] > NEAR_TIE
    assert torch.equal(got.argmax(1)[clear], want.argmax(1)[clear])
    accuracy = float((got.argmax(1) == digits.labels).double().mean())
    assert accuracy > 0.9, "the network has learnt nothing, so agreement says little"


def test_digits_with_nothing_but_the_class_revealed(digits: Digits) -> None:
    captured = capture(digits.cnn, [digits.images[:1]], reveal="argmax")
    (want,) = plaintext(digits.cnn, [digits.images])
    (got,), _ = run_local(captured, [digits.images], 2)
    best = want.topk(2).values
    clear = best[:, 0] - best[:, 1] > NEAR_TIE
    assert torch.equal(got[clear], want.argmax(1)[clear].double())


def test_what_a_run_costs_depends_on_shapes_only(residual: Case, parties: int) -> None:
    """Same messages, bit for bit in size, whatever the secrets: inputs of all kinds, and other weights."""
    (x,) = residual.inputs(2)
    others = [torch.zeros_like(x), torch.full_like(x, 1000.0), -x]
    seen = [run_local(residual.captured, [x], parties)[1] for x in (x, *others)]
    negated = type(residual.captured)(
        residual.captured.program, {name: -w for name, w in residual.captured.weights.items()}
    )
    seen.append(run_local(negated, [x], parties)[1])
    sizes = [[(label, bits, tuple(value.shape)) for label, bits, value in t.openings] for t in seen]
    assert all(s == sizes[0] for s in sizes)
    assert len({(t.rounds, t.bytes_sent, t.dealer_bytes) for t in seen}) == 1


def test_output_shares_are_fresh_and_sum_to_the_output(residual: Case) -> None:
    """Two parties' shares of a pass-through are not the client's own: they are re-randomised."""
    program = capture(torch.nn.Identity().eval(), [torch.zeros(2, 3)]).program
    world = LocalWorld(2, b"s" * 32)
    x = torch.arange(6).reshape(2, 3)
    shares = world.share(x, 16)
    outputs = world.run(lambda ctx, held, own: interpret(program, ctx, held, own), [{}, {}], [[s] for s in shares])
    assert torch.equal(world.reveal([o[0] for o in outputs]), x)
    assert not any(torch.equal(o[0].share, s.share) for o, s in zip(outputs, shares, strict=True))


PROGRAM = Program(
    frac_bits=16,
    inputs=(Input("x", (-1, 3), 16), Input("y", (-1, 2, 2), 16), Input("z", (4,), 16)),
    parameters=(),
    constants=(),
    nodes=(Node("s", "aten.relu.default", (Ref("x"),), {}, "layer"),),
    results=(Ref("s"),),
    outputs=(Value("s", (-1, 3), 16),),
    sizes=(Size("batch"),),
)


def test_inputs_that_fit() -> None:
    for batch in (1, 2, 7):
        check_inputs(PROGRAM, [(batch, 3), (batch, 2, 2), (4,)])


@pytest.mark.parametrize(
    ("shapes", "error", "why"),
    [
        ([(1, 3)], InputError, "takes 3 inputs, not 1"),
        ([(1, 3), (1, 2, 2), (5,)], ShapeError, r"'z' has shape \[5\], the model takes \[4\]"),
        ([(1, 4), (1, 2, 2), (4,)], ShapeError, r"'x' has shape \[1, 4\], the model takes \[batch, 3\]"),
        ([(3,), (1, 2, 2), (4,)], ShapeError, "'x' has shape"),
        ([(1, 1, 3), (1, 2, 2), (4,)], ShapeError, "'x' has shape"),
        ([(0, 3), (0, 2, 2), (4,)], ShapeError, "batch at least 1"),
        ([(2, 3), (3, 2, 2), (4,)], ShapeError, r"different batch sizes: \[2, 3\]"),
        ([(-1, 3), (-1, 2, 2), (4,)], ShapeError, "'x' has shape"),
    ],
)
def test_inputs_that_do_not_fit(shapes: list[tuple[int, ...]], error: type[Exception], why: str) -> None:
    with pytest.raises(error, match=why):
        check_inputs(PROGRAM, shapes)
    with pytest.raises(error, match=why):
        plan_inference(PROGRAM, shapes, parties=2)


@pytest.mark.parametrize(
    ("node", "error", "why"),
    [
        (Node("s", "aten.erfinv.default", (Ref("x"),), {}, "act"), UnsupportedError, "at act: this operator is not"),
        (Node("s", "aten.relu.default", (Ref("x"),), {"no": 1}, "act"), UnsupportedError, "at act: called in a way"),
        (Node("s", "aten.relu.default", (3,), {}, ""), UnsupportedError, "aten.relu.default at s: called in a way"),
        (Node("s", "aten.view.default", (Ref("x"), [5]), {}, "v"), ShapeError, "aten.view.default at v: the shapes"),
        (Node("s", "aten.add.Tensor", (Ref("x"), Ref("z")), {}, "a"), ShapeError, "aten.add.Tensor at a: the shapes"),
        (Node("s", "aten.sym_size.int", (Ref("x"), 0), {}, ""), UnsupportedError, "does not depend on its inputs"),
    ],
)
def test_programs_that_fail_say_where(node: Node, error: type[Exception], why: str) -> None:
    program = Program(**{**{f: getattr(PROGRAM, f) for f in PROGRAM.__dataclass_fields__}, "nodes": (node,)})
    with pytest.raises(error, match=why):
        plan_inference(program, [(2, 3), (2, 2, 2), (4,)], parties=2)


def test_values_are_dropped_after_their_last_use(residual: Case) -> None:
    """A run needs memory for what is alive, not for the whole network: nothing holds on to earlier values."""
    import weakref

    from mpcinfer.nn import registry

    alive: list[weakref.ref[torch.Tensor]] = []
    peak = 0
    original = registry._RULES["aten.relu.default"]

    async def spy(ctx: object, x: object) -> object:
        nonlocal peak
        y = await original(ctx, x)
        alive.append(weakref.ref(y.share))
        peak = max(peak, sum(r() is not None for r in alive))
        return y

    model = torch.nn.Sequential(*(torch.nn.ReLU() for _ in range(6))).eval()
    captured = capture(model, [torch.zeros(2, 3)])
    registry._RULES["aten.relu.default"] = spy
    try:
        run_local(captured, [torch.ones(2, 3)], 2)
    finally:
        registry._RULES["aten.relu.default"] = original
    assert peak <= 2 * 2  # one input and one output at each of two parties


def test_a_deployment_serves_many_requests(residual: Case) -> None:
    world, holdings = deploy_local(residual.captured, 2)
    program, (x,) = residual.captured.program, residual.inputs(2)
    encoded = torch.round(x.double() * 2**16).to(torch.int64)
    results = []
    for _ in range(2):
        own = [[s] for s in world.share(encoded, 16)]
        outputs = world.run(lambda ctx, h, x: interpret(program, ctx, h, x), holdings, own, weights=holdings)
        results.append(world.reveal([o[0] for o in outputs]).double() / 2**16)
    (want,) = plaintext(residual.model, [x])
    assert all(float((r - want).abs().max()) <= MAX_ERROR for r in results)
    labels = [label for label, _, _ in world.transcript.openings]
    assert len(labels) > len(set(labels))  # the same names in each request, under other keys
