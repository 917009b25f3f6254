"""Plans come from other processes: whatever they say, a decoder answers with a plan or an InputError."""

from __future__ import annotations

import json
from typing import Any

import pytest

from mpcinfer.errors import InputError
from mpcinfer.protocol.tracing import Plan

COMPARISON = {
    "kind": "Comparison", "shape": [3], "width": 64, "thresholds": 1, "products": False, "others": 0, "other_bits": 64,
    "numbers": False, "d": 0,
}  # fmt: skip
EXPONENTIAL = {
    "kind": "Exponential", "shape": [3], "frac_bits": 16, "dealt_bits": 42, "ceiling": False, "width": 48, "d": 16,
}  # fmt: skip
TRIPLE = {"kind": "Triple", "op": {"name": "matmul", "args": []}, "x": [2, 3], "y": [3, 4]}
TRUNCATION = {"kind": "Truncation", "shape": [2], "d": 16}


def _plan(item: dict[str, Any]) -> bytes:
    return json.dumps({"deployment": "", "entries": [["a#0", item]]}).encode()


@pytest.mark.parametrize("item", [COMPARISON, EXPONENTIAL, TRIPLE, TRUNCATION], ids=lambda item: item["kind"])
def test_honest_plans_are_read(item: dict[str, Any]) -> None:
    assert Plan.from_bytes(_plan(item)).correction_bytes() > 0


@pytest.mark.parametrize(
    "item",
    [
        COMPARISON | {"shape": [-1]},
        COMPARISON | {"width": 7},
        COMPARISON | {"width": 7, "products": True},
        COMPARISON | {"width": 65, "products": True},
        EXPONENTIAL | {"d": -1},
        EXPONENTIAL | {"d": 17},
        COMPARISON | {"thresholds": 2, "others": 1},
        COMPARISON | {"shape": [1 << 40]},
        TRIPLE | {"op": {"name": "divide", "args": []}},
        TRIPLE | {"op": {}},
        TRIPLE | {"y": [5, 4]},
        TRUNCATION | {"shape": "x"},
        TRUNCATION | {"shape": [1.5]},
        TRUNCATION | {"d": 300},
    ],
    ids=str,
)
def test_impossible_plans_are_refused(item: dict[str, Any]) -> None:
    with pytest.raises(InputError, match="impossible"):
        Plan.from_bytes(_plan(item))
