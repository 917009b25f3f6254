"""A Program: what the parties evaluate. Public, plain data, the same at every party."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from mpcinfer.errors import InputError
from mpcinfer.graph.sizes import Size
from mpcinfer.ring.codec import MAX_FRAC_BITS, MIN_FRAC_BITS, FixedPoint

REVEALS = ("logits", "probabilities", "top-k", "argmax", "tokens")
FORMAT = 3
MAX_DEPTH = 4  # of lists in an argument
MAX_INDICES = 1 << 24  # an input may range over


@dataclass(frozen=True)
class Ref:
    """A reference to a value computed earlier, by name."""

    name: str


@dataclass(frozen=True)
class Node:
    """One operator: `op` as in the registry; arguments are plain data, lists and `Ref`s; `path` is the module's."""

    name: str
    op: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    path: str = ""

    @cached_property
    def references(self) -> tuple[str, ...]:
        """Names it uses, with repetitions."""
        found: list[str] = []

        def visit(x: Any) -> None:
            if isinstance(x, Ref):
                found.append(x.name)
            elif isinstance(x, list | tuple):
                for item in x:
                    visit(item)
            elif isinstance(x, dict):
                for item in x.values():
                    visit(item)

        visit((self.args, self.kwargs))
        return tuple(found)


@dataclass(frozen=True)
class Value:
    """Declaration of an input, an output, or a parameter. A shape entry of -k is the program's free size number k."""

    name: str
    shape: tuple[int, ...]
    frac_bits: int


@dataclass(frozen=True)
class Input(Value):
    """What the model takes: numbers of absolute value below `limit`, a power of two (0: what the encoding can hold).

    `proven`: whatever stays below it is computed right; otherwise the limit was calibrated on examples.
    Without fraction bits it takes indices from 0 up to but not including `limit`.
    """

    limit: float = 0.0
    proven: bool = False


@dataclass(frozen=True)
class Parameter(Value):
    """A secret of the model. `weight`: it is an operand of fixed products, so its mask is opened at deploy."""

    weight: bool = False


@dataclass(frozen=True)
class Cache(Value):
    """Rows that the parties keep from one step of a session to the next; their number, last axis but one, is 0 here.

    `result` is the node that appends to them, `rows` how many there may be at most.
    """

    result: str = ""
    rows: int = 0


@dataclass(frozen=True)
class Constant(Value):
    """A public tensor: integers at scale 2^frac_bits, row-major. `boolean`: they are 0 and 1 and mean truth values."""

    data: tuple[int, ...] = ()
    boolean: bool = False


@dataclass(frozen=True)
class Program:
    """Inputs, parameters, nodes in order of evaluation, outputs. `reveal` says what the outputs were reduced to.

    `sizes` are the free sizes, which shapes of inputs and outputs refer to. With `caches` it is evaluated step by step,
    in sessions: its input are the indices of a text's next tokens, its output the logits of the token after them; with
    reveal "tokens" the parties choose that token and nothing else leaves.
    """

    frac_bits: int
    inputs: tuple[Input, ...]
    parameters: tuple[Parameter, ...]
    constants: tuple[Constant, ...]
    nodes: tuple[Node, ...]
    results: tuple[Ref, ...]
    outputs: tuple[Value, ...]
    reveal: str = "logits"
    sizes: tuple[Size, ...] = ()
    caches: tuple[Cache, ...] = ()

    @property
    def context(self) -> int:
        """How many tokens a session may have; 0 if there are no sessions."""
        return min((cache.rows for cache in self.caches), default=0)

    @property
    def size(self) -> int:
        """Number of secret parameters."""
        return sum(math.prod(p.shape) for p in self.parameters)

    def to_bytes(self) -> bytes:
        """JSON with one spelling."""
        data = {"format": FORMAT, **asdict(self)}
        data["nodes"] = [
            [n.name, n.op, _plain(n.args), {k: _plain(v) for k, v in n.kwargs.items()}, n.path] for n in self.nodes
        ]
        data["results"] = [r.name for r in self.results]
        return json.dumps(data, sort_keys=True, separators=(",", ":")).encode()

    @staticmethod
    def from_bytes(data: bytes) -> Program:
        """The inverse; InputError for anything that isn't a well-formed program of this format."""
        try:
            raw = json.loads(data)
            if raw.pop("format") != FORMAT:
                raise InputError("the program has another format; deploy with the version the parties run")
            program = Program(
                frac_bits=_integer(raw.pop("frac_bits")),
                inputs=tuple(
                    Input(**_declared(v, "limit", "proven"), limit=_float(v["limit"]), proven=_flag(v["proven"]))
                    for v in raw.pop("inputs")
                ),
                parameters=tuple(
                    Parameter(**_declared(v, "weight"), weight=_flag(v["weight"])) for v in raw.pop("parameters")
                ),
                constants=tuple(
                    Constant(
                        **_declared(v, "data", "boolean"),
                        data=tuple(map(_integer, v["data"])),
                        boolean=_flag(v["boolean"]),
                    )
                    for v in raw.pop("constants")
                ),
                nodes=tuple(_node(*parts) for parts in raw.pop("nodes")),
                results=tuple(Ref(_text(r)) for r in raw.pop("results")),
                outputs=tuple(Value(**_declared(v)) for v in raw.pop("outputs")),
                reveal=_text(raw.pop("reveal")),
                sizes=tuple(_size(**size) for size in raw.pop("sizes")),
                caches=tuple(
                    Cache(**_declared(v, "result", "rows"), result=_text(v["result"]), rows=_integer(v["rows"]))
                    for v in raw.pop("caches")
                ),
            )
            if raw:
                raise ValueError("unknown fields")
            program.check()
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError("this is not a program") from error
        return program

    def digest(self) -> bytes:
        """SHA-256 of the program."""
        return hashlib.sha256(self.to_bytes()).digest()

    def check(self) -> None:
        """Every name is defined once and before it is used, sizes and scales are possible; InputError otherwise."""
        known: set[str] = set()
        for name in [v.name for v in (*self.inputs, *self.caches, *self.parameters, *self.constants)]:
            if name in known:
                raise InputError(f"the program defines {name!r} twice")
            known.add(name)
        for node in self.nodes:
            missing = [r for r in node.references if r not in known]
            if missing or node.name in known:
                raise InputError(f"node {node.name!r} of the program is out of order")
            known.add(node.name)
        if not all(r.name in known for r in self.results) or len(self.outputs) != len(self.results):
            raise InputError("the program's results are not defined")
        if self.reveal not in REVEALS or not MIN_FRAC_BITS <= self.frac_bits <= MAX_FRAC_BITS:
            raise InputError("the program's declaration of what it reveals, or of its fixed point, is impossible")
        values = (*self.inputs, *self.caches, *self.parameters, *self.constants, *self.outputs)
        if any(v.frac_bits not in (0, self.frac_bits) for v in values):
            raise InputError("the program mixes fixed-point scales")
        if not all(map(self._possible, self.inputs)):
            raise InputError(
                "the limit of an input is a power of two that the encoding can hold, or the number of its indices"
            )
        if any(s < 0 for v in (*self.parameters, *self.constants) for s in v.shape):
            raise InputError("a parameter of the program has no definite size")
        free = {-s for v in self.inputs for s in v.shape if s < 0}
        if free != set(range(1, len(self.sizes) + 1)) or any(s < 0 and -s not in free for v in values for s in v.shape):
            raise InputError("the free sizes of the program are not those of its inputs")
        if any(not 1 <= s.low <= (s.high or s.low) for s in self.sizes):
            raise InputError("a free size of the program has an impossible range")
        if len({s.name for s in self.sizes}) != len(self.sizes):
            raise InputError("two free sizes of the program have the same name")
        for c in self.constants:
            if len(c.data) != math.prod(c.shape) or not all(-(1 << 62) < x < 1 << 62 for x in c.data):
                raise InputError(f"the values of {c.name!r} do not fit its shape")
            if c.boolean and (c.frac_bits or not set(c.data) <= {0, 1}):
                raise InputError(f"the values of {c.name!r} are no truth values")

        self._check_caches()

    def _check_caches(self) -> None:
        appended = {n.name: n.args[0] for n in self.nodes if n.op == "mpc.append" and n.args}
        if any(appended.get(c.result) != Ref(c.name) for c in self.caches) or len(appended) != len(self.caches):
            raise InputError("a cache of the program is not appended to exactly once")
        if any(
            len(c.shape) < 2 or [i for i, s in enumerate(c.shape) if s < 1] != [len(c.shape) - 2] for c in self.caches
        ):
            raise InputError("a cache of the program has an impossible shape")
        texts = len(self.inputs) == len(self.outputs) == 1 and not self.inputs[0].frac_bits and self.context > 0
        if self.caches and (not texts or self.reveal not in ("tokens", "logits")):
            raise InputError("a program with caches takes indices and yields logits or tokens")
        if self.reveal == "tokens" and not self.caches:
            raise InputError("only a program with caches yields tokens")

    def _possible(self, declared: Input) -> bool:
        limit = declared.limit
        if not declared.frac_bits:
            return limit.is_integer() and 1 <= limit <= MAX_INDICES
        return not limit or (math.frexp(limit)[0] == 0.5 and 0 < limit <= FixedPoint(self.frac_bits).limit)


def _text(x: Any) -> str:
    if not isinstance(x, str):
        raise TypeError("not a string")
    return x


def _integer(x: Any) -> int:
    if isinstance(x, bool) or not isinstance(x, int):
        raise TypeError("not an integer")
    return x


def _flag(x: Any) -> bool:
    if not isinstance(x, bool):
        raise TypeError("not a flag")
    return x


def _float(x: Any) -> float:
    if not isinstance(x, float):
        raise TypeError("not a floating-point number")
    return x


def _size(name: Any, low: Any, high: Any) -> Size:
    return Size(_text(name), _integer(low), _integer(high))


def _declared(raw: Any, *more: str) -> dict[str, Any]:
    if set(raw) != {"name", "shape", "frac_bits", *more}:
        raise ValueError("not a declaration")
    shape = tuple(map(_integer, raw["shape"]))
    return {"name": _text(raw["name"]), "shape": shape, "frac_bits": _integer(raw["frac_bits"])}


def _node(name: Any, op: Any, args: Any, kwargs: Any, path: Any) -> Node:
    if not isinstance(args, list) or not isinstance(kwargs, dict):
        raise TypeError("not a node")
    return Node(_text(name), _text(op), tuple(map(_refs, args)), {k: _refs(v) for k, v in kwargs.items()}, _text(path))


def _plain(x: Any) -> Any:
    if isinstance(x, Ref):
        return {"$": x.name}
    if isinstance(x, list | tuple):
        return [_plain(item) for item in x]
    if x is None or isinstance(x, bool | int | float | str):
        return x
    raise InputError(f"a program cannot carry a {type(x).__name__}")


def _refs(x: Any, depth: int = 0) -> Any:
    """The inverse of `_plain` for one argument."""
    if isinstance(x, dict):
        if set(x) != {"$"}:
            raise ValueError("not a reference")
        return Ref(_text(x["$"]))
    if isinstance(x, list):
        if depth == MAX_DEPTH:
            raise ValueError("nested too deeply")
        return [_refs(item, depth + 1) for item in x]
    if isinstance(x, float) and not math.isfinite(x):
        raise ValueError("not a finite number")
    return x
