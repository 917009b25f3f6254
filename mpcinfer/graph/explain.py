"""What a Program costs, layer by layer, before anything is deployed: read off the trace that a run must repeat.

Rounds, bytes and correlations are exact. Seconds are estimates of this model: a round takes half a round trip of the
network and `ROUND` seconds at both ends; bytes travel at the network's rate; a party multiplies at `MULTIPLY_ADDS` per
second and handles what it expanded from seeds at `ONLINE_BYTES`; before, dealer and party multiply, and expand every
field, at `OFFLINE_BYTES`. The constants fit the operators in docs/benchmarks, measured on two idle cores of an AMD EPYC
at 2.6 GHz; other machines, and other work on them, differ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from mpcinfer.graph.plan import Planner, plan_inference, plan_masks
from mpcinfer.graph.program import Input, Node, Program
from mpcinfer.graph.rounds import Step, steps
from mpcinfer.graph.step import capacity
from mpcinfer.nn.sampling import Choice
from mpcinfer.protocol.correlation import Kind, correction_bytes
from mpcinfer.protocol.tracing import Cost, Plan, outermost_scope

ROUND = 0.35e-3
MULTIPLY_ADDS = 10e9
ONLINE_BYTES = 0.45e9
OFFLINE_BYTES = 1e9


@dataclass(frozen=True)
class Network:
    """A network between the parties and from the dealer: bits per second, seconds for a round trip."""

    bandwidth: float
    round_trip: float

    def seconds(self, rounds: int, size: int) -> float:
        """How long `rounds` exchanges take in which a party sends `size` bytes."""
        return rounds * (self.round_trip / 2 + ROUND) + 8 * size / self.bandwidth


NETWORKS = {"LAN": Network(1e9, 0.5e-3), "WAN": Network(200e6, 40e-3)}


@dataclass(frozen=True)
class Price:
    """`online_bytes` is what each party sends to all others, `offline_bytes` what the dealer sends to the last party.

    `correlations` counts them by kind; seconds are by network.
    """

    rounds: int
    online_bytes: int
    offline_bytes: int
    correlations: dict[str, int]
    online_seconds: dict[str, float]
    offline_seconds: dict[str, float]


@dataclass(frozen=True)
class Layer:
    """The nodes of one module. A round that carries openings of several layers counts in each."""

    path: str
    operators: tuple[str, ...]
    price: Price


@dataclass(frozen=True)
class Deployment:
    """What is paid once: the upload, the opening of the weights' masks (bytes as in Price), memory in bytes.

    A restart of a party or the dealer opens masks again. `upload` goes to the last party, the others get seeds.
    """

    parameters: int
    upload: int
    rounds: int
    online_bytes: int
    memory_of_a_party: int
    memory_of_the_dealer: int


@dataclass(frozen=True)
class Explanation:
    """One request with inputs of `shapes`. Layers have no frame headers; `total` has, and is what a run counts."""

    parties: int
    shapes: tuple[tuple[int, ...], ...]
    inputs: tuple[Input, ...]
    layers: tuple[Layer, ...]
    headers: dict[str, int]
    total: Price
    deployment: Deployment
    steps: tuple[Step, ...]  # the rounds of `total`, in order


def explain(
    program: Program,
    shapes: Sequence[tuple[int, ...]],
    *,
    parties: int,
    round_bytes: Callable[[int], int] = int,
    dealt_bytes: Callable[[int], int] = int,
    compared: int = 0,
) -> Explanation:
    """The price of a request with inputs of these shapes.

    round_bytes, dealt_bytes: how many bytes the wire makes of one message of a round and of all corrections. compared:
    the bytes of a last round, in which the parties compare what they have seen; 0 for none. Raises what
    `plan_inference` does.
    """
    plan, cost, _ = plan_inference(program, shapes, parties=parties)
    return _explained(program, shapes, plan, cost, parties, round_bytes, dealt_bytes, compared)


def explain_step(
    program: Program,
    tokens: int,
    rows: int,
    *,
    parties: int,
    round_bytes: Callable[[int], int] = int,
    dealt_bytes: Callable[[int], int] = int,
    compared: int = 0,
) -> Explanation:
    """The price of a step of a language model: so many tokens after `rows` others, and a choice of the next one."""
    plan, cost, _ = Planner(program, parties=parties).step(tokens, capacity(rows + tokens), Choice())
    return _explained(program, [(1, tokens)], plan, cost, parties, round_bytes, dealt_bytes, compared)


def _explained(
    program: Program,
    shapes: Sequence[tuple[int, ...]],
    plan: Plan,
    cost: Cost,
    parties: int,
    round_bytes: Callable[[int], int],
    dealt_bytes: Callable[[int], int],
    compared: int,
) -> Explanation:
    cost = _with_comparison(cost, compared, parties)
    nodes = {node.name: node for node in program.nodes}
    tallies: dict[str, _Tally] = {path(node): _Tally() for node in program.nodes}

    def tally(scope: str) -> _Tally:
        return tallies.setdefault(path(nodes[scope]) if scope in nodes else "outputs", _Tally())

    for name, item in plan.entries:
        tally(outermost_scope(name)).draw(item)
    for message in cost.messages:
        for layer in _each_once(tally(scope) for scope in message):
            layer.rounds += 1
        for scope, size in message.items():
            tally(scope).sent += size * (parties - 1)

    total = _Tally()
    for part in tallies.values():
        total.include(part)
    online, offline = _framed(cost, parties, round_bytes), dealt_bytes(plan.correction_bytes())
    headers = {"online_bytes": online - total.sent, "offline_bytes": offline - total.dealt}
    total.rounds, total.sent, total.dealt = cost.rounds, online, offline
    operators: dict[str, list[str]] = {}
    for node in program.nodes:
        operators.setdefault(path(node), []).append(node.op)
    return Explanation(
        parties,
        tuple(tuple(shape) for shape in shapes),
        program.inputs,
        tuple(Layer(at, tuple(operators.get(at, ())), part.price(parties)) for at, part in tallies.items()),
        headers,
        total.price(parties),
        _deployment(program, parties, round_bytes, compared),
        steps(cost, nodes, parties, round_bytes),
    )


def path(node: Node) -> str:
    """The module a node belongs to, or the node's own name."""
    return node.path or node.name


@dataclass
class _Tally:
    """What adds up: bytes, correlations, and work as the cost model knows it."""

    rounds: int = 0
    sent: int = 0
    dealt: int = 0
    expanded: int = 0
    products: int = 0
    products_before: int = 0
    correlations: Counter[str] = field(default_factory=Counter)

    def draw(self, item: Kind) -> None:
        online, before = item.multiply_adds()
        self.products += online
        self.products_before += before
        self.dealt += correction_bytes(item)
        self.expanded += sum(f.packed_bytes for f in (item.free() | item.derived()).values())
        self.correlations[type(item).__name__] += 1

    def include(self, other: _Tally) -> None:
        self.sent += other.sent
        self.dealt += other.dealt
        self.expanded += other.expanded
        self.products += other.products
        self.products_before += other.products_before
        self.correlations += other.correlations

    def price(self, parties: int) -> Price:
        online = self.products / MULTIPLY_ADDS + self.expanded / ONLINE_BYTES
        # the dealer expands the seeds of all parties, then each party its own
        offline = self.products_before / MULTIPLY_ADDS + self.expanded * (parties + 1) / OFFLINE_BYTES
        return Price(
            self.rounds,
            self.sent,
            self.dealt,
            dict(sorted(self.correlations.items())),
            {name: online + network.seconds(self.rounds, self.sent) for name, network in NETWORKS.items()},
            {name: offline + network.seconds(0, self.dealt) for name, network in NETWORKS.items()},
        )


def _each_once(tallies: Iterable[_Tally]) -> list[_Tally]:
    return list({id(tally): tally for tally in tallies}.values())


def _framed(cost: Cost, parties: int, round_bytes: Callable[[int], int]) -> int:
    return sum(round_bytes(message.total()) for message in cost.messages) * (parties - 1)


def _with_comparison(cost: Cost, compared: int, parties: int) -> Cost:
    if not compared:
        return cost
    messages = [*cost.messages, Counter({"comparison": compared})]
    return Cost(cost.rounds + 1, cost.bytes_sent + compared * (parties - 1), cost.openings, messages)


def _deployment(program: Program, parties: int, round_bytes: Callable[[int], int], compared: int) -> Deployment:
    plan, cost = plan_masks(program, parties=parties, deployment="")
    cost = _with_comparison(cost, compared, parties)
    lasting = sum(f.packed_bytes for _, item in plan.entries for f in item.free().values())
    return Deployment(
        program.size,
        8 * program.size,
        cost.rounds,
        _framed(cost, parties, round_bytes),
        8 * program.size + lasting,
        lasting,
    )
