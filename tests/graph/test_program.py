"""A Program as bytes: one spelling, and nothing gets in that isn't one."""

from __future__ import annotations

import copy
import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mpcinfer.errors import InputError, MpcInferError
from mpcinfer.graph.plan import constants, plan_inference, plan_masks
from mpcinfer.graph.program import Constant, Input, Node, Parameter, Program, Ref, Value
from mpcinfer.graph.sizes import Size
from tests.graph.conftest import Case

SMALL = Program(
    frac_bits=16,
    inputs=(Input("x", (-1, 3), 16, 2.0**20, True),),
    parameters=(Parameter("w.weight", (3, 2), 16, True), Parameter("b", (2,), 16)),
    constants=(Constant("c", (2,), 16, (65536, -32768)), Constant("m", (2,), 0, (1, 0), True)),
    nodes=(
        Node("y", "mpc.linear", (Ref("x"), Ref("w.weight"), Ref("b")), {}, "fc"),
        Node("z", "aten.add.Tensor", (Ref("y"), Ref("c")), {"alpha": 2}, ""),
        Node("p", "aten.pad.default", (Ref("z"), [1, 0]), {"mode": "constant", "value": 0.5}, "pad"),
        Node("s", "aten.cat.default", ([Ref("p"), Ref("p")], 1), {}, ""),
    ),
    results=(Ref("s"), Ref("y")),
    outputs=(Value("s", (-1, 6), 16), Value("y", (-1, 2), 16)),
    sizes=(Size("batch", 1, 64),),
)


def test_round_trip(residual: Case) -> None:
    for program in (SMALL, residual.captured.program):
        data = program.to_bytes()
        again = Program.from_bytes(data)
        assert again == program and again.to_bytes() == data and again.digest() == program.digest()
        assert len(program.digest()) == 32


def test_another_program_has_another_digest() -> None:
    assert replace(SMALL, reveal="argmax").digest() != SMALL.digest()


def test_size_counts_secret_numbers() -> None:
    assert SMALL.size == 3 * 2 + 2


def test_references_with_repetitions() -> None:
    assert SMALL.nodes[3].references == ("p", "p")
    assert Node("n", "op", (1, "x", None), {"k": [Ref("a"), [Ref("b")]]}).references == ("a", "b")


def test_a_program_carries_plain_data_only() -> None:
    with pytest.raises(InputError, match="cannot carry a complex"):
        replace(SMALL, nodes=(Node("y", "op", (1j,), {}),)).to_bytes()


@pytest.mark.parametrize(
    "data",
    [
        b"", b"[]", b"{}", b"null", b"\xff\xfe", b'{"format":1}', b'{"format":2}',
        b"[" * 100_000, b'{"format":' * 50_000,
        SMALL.to_bytes()[:-1], SMALL.to_bytes() + b"x", SMALL.to_bytes().replace(b'"format":3', b'"format":1'),
    ],
    ids=range(12),
)  # fmt: skip
def test_what_is_no_program(data: bytes) -> None:
    with pytest.raises(InputError):
        Program.from_bytes(data)


CHANGES: list[tuple[list[Any], Any]] = [
    (["frac_bits"], 7), (["frac_bits"], 25), (["frac_bits"], True), (["frac_bits"], 16.0), (["frac_bits"], None),
    (["unknown"], 1), (["reveal"], "weights"), (["reveal"], ["argmax"]), (["results"], ["nowhere", "y"]),
    (["results"], []), (["results"], [["y"], "y"]), (["outputs"], []), (["outputs", 0, "frac_bits"], 8),
    (["inputs", 0, "name"], ["x"]), (["inputs", 0, "name"], "b"), (["inputs", 0, "shape"], [-2, 3]),
    (["inputs", 0, "limit"], 3.0), (["inputs", 0, "limit"], 1 << 20), (["inputs", 0, "limit"], 2.0**31),
    (["inputs", 0, "limit"], -8.0), (["inputs", 0, "limit"], float("inf")), (["inputs", 0, "limit"], float("nan")),
    (["inputs", 0, "frac_bits"], 8), (["inputs", 0, "shape"], [2, 3]), (["outputs", 0, "shape"], [-2, 6]),
    (["sizes"], []), (["sizes", 0, "low"], 0), (["sizes", 0, "low"], 65), (["sizes", 0, "high"], -1),
    (["sizes", 0, "name"], 3), (["sizes", 0, "more"], 3), (["sizes", 0], []), (["sizes"], {}),
    (["constants", 1, "data"], [1, 2]), (["constants", 1, "frac_bits"], 16), (["constants", 1, "boolean"], 1),
    (["inputs", 0, "proven"], 1), (["inputs", 0, "more"], 1), (["outputs", 0, "limit"], 8.0),
    (["parameters", 0, "limit"], 8.0), (["constants", 0, "more"], 1),
    (["inputs", 0, "shape"], "ab"), (["inputs", 0, "shape"], [1.5, 3]), (["inputs", 0, "frac_bits"], float("inf")),
    (["parameters", 0, "shape"], [-1, 2]), (["parameters", 0, "weight"], 1), (["parameters", 1, "name"], "x"),
    (["constants", 0, "data"], [1]), (["constants", 0, "data"], [1, 2, 3]), (["constants", 0, "data"], [1, 1 << 62]),
    (["constants", 0, "data"], [1, 0.5]), (["constants", 0, "data"], {"1": 2}), (["constants", 0, "shape"], [3]),
    (["nodes", 0, 0], "x"), (["nodes", 0, 0], ["y"]), (["nodes", 0, 1], {}), (["nodes", 0, 2], "xw"),
    (["nodes", 0, 2], [{"$": "later"}]), (["nodes", 0, 2], [{"$": ["x"]}]), (["nodes", 0, 2], [{"a": 1}]),
    (["nodes", 0, 2], [float("nan")]), (["nodes", 0, 2], [[[[[[1]]]]]]), (["nodes", 0, 3], []), (["nodes", 0], []),
    (["nodes", 0, 3], {"k": {"$": "s"}}), (["nodes", 0, 4], None), (["nodes"], {}), (["nodes"], "abc"), (["nodes"], 3),
]  # fmt: skip


def changed(data: bytes, path: list[Any], value: Any) -> bytes:
    raw = json.loads(data)
    at = raw
    for step in path[:-1]:
        at = at[step]
    at[path[-1]] = value
    return json.dumps(raw).encode()


@pytest.mark.parametrize(("path", "value"), CHANGES, ids=[f"{'.'.join(map(str, p))}={v}" for p, v in CHANGES])
def test_changes_that_are_refused(path: list[Any], value: Any) -> None:
    with pytest.raises(InputError):
        Program.from_bytes(changed(SMALL.to_bytes(), path, value))


# sizes stay small: an owner may deploy a model that is too large for the parties, which is not what is tested here
TEXT = st.sampled_from(["x", "y", "b", "$", "s", "", "\ud800"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 40) | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(["$", "name", "a"]), inner, max_size=3),
    max_leaves=6,
)


def places(x: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    steps = x.items() if isinstance(x, dict) else enumerate(x) if isinstance(x, list) else ()
    return [found for step, inner in steps for found in [(*path, step), *places(inner, (*path, step))]]


def only_input_errors(data: bytes) -> Program | None:
    try:
        return Program.from_bytes(data)
    except InputError:
        return None


@given(st.binary(max_size=300) | JSON.map(lambda x: json.dumps(x).encode()))
def test_arbitrary_bytes_and_json(data: bytes) -> None:
    assert only_input_errors(data) is None


@given(st.data())
def test_flipped_bytes(data: st.DataObject) -> None:
    raw = bytearray(SMALL.to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    only_input_errors(bytes(raw))


@settings(max_examples=300, suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(st.data())
def test_mutated_programs_are_read_refused_or_planned(residual: Case, data: st.DataObject) -> None:
    """What is read can be traced, or is refused with an error that says so: a party never meets another exception."""
    original = data.draw(st.sampled_from([SMALL, residual.captured.program]))
    raw = json.loads(original.to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(raw)))
        at = raw
        for step in path[:-1]:
            at = at[step]
        if data.draw(st.booleans()):
            at[path[-1]] = copy.deepcopy(data.draw(JSON))
        elif isinstance(at, dict):
            del at[path[-1]]
        else:
            at.insert(path[-1], copy.deepcopy(at[data.draw(st.integers(0, len(at) - 1))]))
    program = only_input_errors(json.dumps(raw).encode())
    if program is None:
        return
    assert Program.from_bytes(program.to_bytes()) == program
    try:
        constants(program)
        plan_masks(program, parties=2, deployment="")
        plan_inference(program, [tuple(2 if s == -1 else s for s in v.shape) for v in program.inputs], parties=2)
    except MpcInferError:
        pass
