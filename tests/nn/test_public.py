"""What the parties compute of public numbers: as torch does, in integers, truth values and what masks make of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from mpcinfer.errors import UnsupportedError
from mpcinfer.nn import public
from mpcinfer.nn.public import MASKED, applies, computes, encoded, evaluate, sizes_only, tensors
from mpcinfer.protocol.types import Public, Shared

A, B = torch.tensor([[3, -1, 0], [7, 2, 2]]), torch.tensor([[1, -1, 4], [7, 3, 0]])
T, U = A > 1, B > 1
LISTS = ("cat.default", "stack.default")
# arguments of all that is no comparison, no logic and no arithmetic of two tensors
CALLS: dict[str, tuple[Any, ...]] = {
    "arange.default": (5,), "arange.start": (2, 7), "arange.start_step": (0, 9, 2), "full.default": ([2, 3], 7),
    "zeros.default": ([2],), "ones.default": ([2, 2],), "eye.default": (3,), "eye.m": (2, 3),
    "scalar_tensor.default": (4,),
    "full_like.default": (A, 3), "zeros_like.default": (A,), "ones_like.default": (A,), "new_full.default": (A, [2], 5),
    "new_zeros.default": (A, [3]), "new_ones.default": (A, [3]), "neg.default": (A,), "abs.default": (A,),
    "clamp.default": (A, 0, 2), "div.Tensor_mode": (A, B + 2), "cumsum.default": (A, 1), "sum.default": (A,),
    "sum.dim_IntList": (A, [1], True), "amax.default": (A, [0]), "amin.default": (A, [1]), "logical_not.default": (T,),
    "bitwise_not.default": (T,), "any.default": (T,), "any.dim": (T, 0), "all.default": (T,), "all.dim": (T, 1),
    "where.self": (T, A, B), "where.Scalar": (T, 1, 0), "where.ScalarOther": (T, A, 0), "where.ScalarSelf": (T, 1, B),
    "masked_fill.Scalar": (A, T, 9), "masked_fill.Tensor": (A, T, torch.tensor(9)), "tril.default": (A,),
    "triu.default": (A, 1), "embedding.default": (A, torch.tensor([1, 0])), "index.Tensor": (A, [T]),
    "index_select.default": (A, 1, torch.tensor([2, 0])), "gather.default": (A, 1, B.clamp(0, 2)),
    "split.Tensor": (A, 1), "split_with_sizes.default": (A, [1, 2], 1), "unbind.int": (A, 1),
    "view.default": (A, [3, 2]),
    "_unsafe_view.default": (A, [6]), "permute.default": (A, [1, 0]), "transpose.int": (A, 0, 1), "t.default": (A,),
    "squeeze.default": (A[:1],), "squeeze.dim": (A[:1], 0), "squeeze.dims": (A[:1], [0]), "unsqueeze.default": (A, 1),
    "expand.default": (A[:1], [4, 3]), "repeat.default": (A, [2, 1]), "select.int": (A, 1, 2),
    "slice.Tensor": (A, 1, 0, 2), "flip.default": (A, [1]), "roll.default": (A, [1], [0]),
    "repeat_interleave.self_int": (A, 2, 1), "alias.default": (A,), "detach.default": (A,),
    "diagonal.default": (A,), "clone.default": (A,), "_to_copy.default": (A,),
}  # fmt: skip


def arguments(name: str) -> tuple[Any, ...]:
    if name in CALLS:
        return CALLS[name]
    if name in LISTS:
        return ([A, B],)
    if name.startswith(("logical", "bitwise")):
        return T, U
    return (A, 2) if name.endswith("Scalar") else (A, B.clamp(1) if name.startswith(("remainder", "floor")) else B)


def as_public(x: Any) -> Any:
    return Public(x) if isinstance(x, torch.Tensor) else [as_public(i) for i in x] if isinstance(x, list) else x


NAMES = [name.removeprefix("aten.") for name in public._FUNCTIONS if name.startswith("aten.")]


@pytest.mark.parametrize("name", NAMES)
def test_as_torch_does(name: str) -> None:
    packet, _, overload = name.partition(".")
    args = arguments(name)
    kwargs = {"rounding_mode": "floor"} if name == "div.Tensor_mode" else {}
    want = getattr(getattr(torch.ops.aten, packet), overload)(*args, **kwargs)
    first = want[0] if isinstance(want, list | tuple) else want
    kind = "bool" if first.dtype == torch.bool else "int64"
    given = [as_public(x) for x in args]
    assert applies(f"aten.{name}", given) and computes(f"aten.{name}")
    got = evaluate(f"aten.{name}", given, {**kwargs, "dtype": kind}, 16)
    for g, w in zip(got, want, strict=True) if isinstance(got, list) else [(got, want)]:
        assert g.frac_bits == 0 and torch.equal(g.value, w.to(g.value.dtype)) and g.shape == tuple(w.shape)


def test_real_numbers_of_masks() -> None:
    full = evaluate("aten.full.default", [[3, 3], MASKED], {"dtype": "float64"}, 16)
    mask = evaluate("aten.triu.default", [full, 1], {"dtype": "float64"}, 16)
    assert mask.frac_bits == 16
    assert tensors(mask).tolist() == [[0, MASKED, MASKED], [0, 0, MASKED], [0, 0, 0]]
    twice = evaluate("aten.add.Tensor", [mask, mask], {"dtype": "float64"}, 16)
    assert torch.equal(twice.value, mask.value)  # masked stays masked, and no larger
    inverted = evaluate("aten.rsub.Scalar", [Public(torch.tensor([1, 0])), 1.0], {"dtype": "float64"}, 16)
    assert tensors(inverted).tolist() == [0, 1]
    half = evaluate("aten.mul.Tensor", [Public(torch.tensor([1, 3])), 0.1], {"dtype": "float64"}, 16)
    assert half.value.tolist() == [round(0.1 * 65536), round(0.3 * 65536)]
    for dtype, low in ((torch.float32, -math.inf), (torch.float64, torch.finfo(torch.float32).min)):
        assert tensors(encoded(torch.tensor([low, -(2.0**14), -1.0], dtype=dtype), None, 16)).tolist() == [
            MASKED,
            MASKED,
            -1,
        ]


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2.0**45])
def test_numbers_that_no_party_can_hold(bad: float) -> None:
    with pytest.raises(UnsupportedError, match="not finite, or too large"):
        encoded(torch.tensor([bad]), None, 16)


def test_enormous_tensors_are_refused_before_they_are_made() -> None:
    for op, args in (("aten.ones.default", [[1 << 20, 1 << 20]]), ("aten.arange.default", [1 << 40])):
        with pytest.raises(UnsupportedError, match="more elements"):
            evaluate(op, args, {"dtype": "int64"}, 16)


def test_of_a_secret_only_the_size_is_used() -> None:
    x = Shared(torch.full((2, 3), 5))
    assert applies("aten.zeros_like.default", [x]) and sizes_only("aten.sym_size.int")
    assert evaluate("aten.zeros_like.default", [x], {"dtype": "int64"}, 16).value.tolist() == [[0] * 3] * 2
    assert evaluate("aten.new_ones.default", [x, [2]], {"dtype": "bool"}, 16).value.tolist() == [True] * 2
    assert not applies("aten.add.Tensor", [x, Public(A)]) and not applies("aten.sin.default", [Public(A)])
    assert not sizes_only("aten.add.Tensor") and not computes("aten.sin.default")
