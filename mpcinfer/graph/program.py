"""A Program: what the parties evaluate. Public, plain data, the same at every party."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

from mpcinfer.errors import InputError

REVEALS = ("logits", "probabilities", "top-k", "argmax")
FORMAT = 1


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


@dataclass(frozen=True)
class Value:
    """Declaration of an input, an output, or a parameter. A shape entry of -1 is any batch size >= 1."""

    name: str
    shape: tuple[int, ...]
    frac_bits: int


@dataclass(frozen=True)
class Parameter(Value):
    """A secret of the model. `weight`: it is an operand of fixed products, so its mask is opened at deploy."""

    weight: bool = False


@dataclass(frozen=True)
class Constant:
    """A public tensor: integers at scale 2^frac_bits, row-major."""

    name: str
    shape: tuple[int, ...]
    frac_bits: int
    data: tuple[int, ...]


@dataclass(frozen=True)
class Program:
    """Inputs, parameters, nodes in order of evaluation, outputs. `reveal` says what the outputs were reduced to."""

    frac_bits: int
    inputs: tuple[Value, ...]
    parameters: tuple[Parameter, ...]
    constants: tuple[Constant, ...]
    nodes: tuple[Node, ...]
    results: tuple[Ref, ...]
    outputs: tuple[Value, ...]
    reveal: str = "logits"

    @property
    def size(self) -> int:
        """Number of secret parameters."""
        return sum(_count(p.shape) for p in self.parameters)

    def to_bytes(self) -> bytes:
        """JSON with one spelling."""
        data = {"format": FORMAT, **asdict(self)}
        data["nodes"] = [[n.name, n.op, _plain(n.args), _plain(n.kwargs), n.path] for n in self.nodes]
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
                frac_bits=int(raw["frac_bits"]),
                inputs=tuple(Value(v["name"], _shape(v["shape"]), int(v["frac_bits"])) for v in raw["inputs"]),
                parameters=tuple(
                    Parameter(v["name"], _shape(v["shape"]), int(v["frac_bits"]), bool(v["weight"]))
                    for v in raw["parameters"]
                ),
                constants=tuple(
                    Constant(v["name"], _shape(v["shape"]), int(v["frac_bits"]), tuple(int(x) for x in v["data"]))
                    for v in raw["constants"]
                ),
                nodes=tuple(
                    Node(n, op, tuple(_refs(args)), _refs(kwargs), path) for n, op, args, kwargs, path in raw["nodes"]
                ),
                results=tuple(Ref(str(r)) for r in raw["results"]),
                outputs=tuple(Value(v["name"], _shape(v["shape"]), int(v["frac_bits"])) for v in raw["outputs"]),
                reveal=str(raw["reveal"]),
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InputError("this is not a program") from error
        program.check()
        return program

    def digest(self) -> bytes:
        """SHA-256 of the program."""
        return hashlib.sha256(self.to_bytes()).digest()

    def check(self) -> None:
        """Every name is defined once and before it is used; InputError otherwise."""
        known: set[str] = set()
        for name in [v.name for v in (*self.inputs, *self.parameters, *self.constants)]:
            if name in known:
                raise InputError(f"the program defines {name!r} twice")
            known.add(name)
        for node in self.nodes:
            missing = [r for r in references(node) if r not in known]
            if missing or node.name in known:
                raise InputError(f"node {node.name!r} of the program is out of order")
            known.add(node.name)
        if any(r.name not in known for r in self.results) or self.reveal not in REVEALS:
            raise InputError("the program's results are not defined")


def references(node: Node) -> list[str]:
    """Names a node uses, with repetitions."""
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

    visit((node.args, node.kwargs))
    return found


def _count(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _shape(raw: Any) -> tuple[int, ...]:
    shape = tuple(int(s) for s in raw)
    if any(s < -1 for s in shape):
        raise InputError("a shape has a negative size")
    return shape


def _plain(x: Any) -> Any:
    if isinstance(x, Ref):
        return {"$": x.name}
    if isinstance(x, list | tuple):
        return [_plain(item) for item in x]
    if isinstance(x, dict):
        return {k: _plain(v) for k, v in x.items()}
    if x is None or isinstance(x, bool | int | float | str):
        return x
    raise InputError(f"a program cannot carry a {type(x).__name__}")


def _refs(x: Any) -> Any:
    if isinstance(x, dict):
        return Ref(x["$"]) if set(x) == {"$"} else {k: _refs(v) for k, v in x.items()}
    return [_refs(item) for item in x] if isinstance(x, list) else x
