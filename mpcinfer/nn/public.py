"""Public numbers: what depends on sizes and constants alone, such as positions and masks. Every party computes it.

Integers and truth values are exact, hence the same at all parties. Real numbers appear only as what masks make of
them (0, 1, -10000, minus infinity) and are encoded after each operator; what is at most -2^14 becomes -2^15, which
softmax and attention take for "masked". Sines, exponentials and the like of sizes are not offered: two hosts may
differ in their last bit. They belong into a table, made before deploying and indexed by position.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch

from mpcinfer.errors import UnsupportedError
from mpcinfer.protocol.types import Public, Sealed

MASKED_FROM = -(2.0**14)
MASKED = -(2.0**15)
_LARGEST = 1 << 28  # elements of one public tensor: more is a mistake

_CREATE = """
    arange.default arange.start arange.start_step full.default zeros.default ones.default eye.default eye.m
    scalar_tensor.default
"""
# depend on the size of their operand only, which may be secret
_LIKE = """
    full_like.default zeros_like.default ones_like.default new_full.default new_zeros.default new_ones.default
"""
# where the result is real they compute in float64, whatever their operands
_ARITHMETIC = """
    add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Tensor rsub.Scalar mul.Tensor mul.Scalar
"""
_OTHERS = """
    neg.default abs.default minimum.default maximum.default clamp.default remainder.Scalar remainder.Tensor
    floor_divide.default div.Tensor_mode cumsum.default sum.default sum.dim_IntList amax.default amin.default
    eq.Scalar eq.Tensor ne.Scalar ne.Tensor lt.Scalar lt.Tensor le.Scalar le.Tensor
    gt.Scalar gt.Tensor ge.Scalar ge.Tensor
    logical_and.default logical_or.default logical_not.default logical_xor.default
    bitwise_and.Tensor bitwise_or.Tensor bitwise_not.default bitwise_xor.Tensor __and__.Tensor __or__.Tensor
    __xor__.Tensor any.default any.dim all.default all.dim
    where.self where.Scalar where.ScalarOther where.ScalarSelf masked_fill.Scalar masked_fill.Tensor
    tril.default triu.default embedding.default index.Tensor index_select.default gather.default
    cat.default stack.default split.Tensor split_with_sizes.default unbind.int
    view.default _unsafe_view.default permute.default transpose.int t.default squeeze.default squeeze.dim squeeze.dims
    unsqueeze.default expand.default repeat.default select.int slice.Tensor flip.default roll.default
    repeat_interleave.self_int alias.default detach.default diagonal.default clone.default _to_copy.default
"""


def _functions(names: str) -> dict[str, Any]:
    found = {}
    for name in names.split():
        packet, _, overload = name.partition(".")
        found[f"aten.{name}"] = getattr(getattr(torch.ops.aten, packet), overload)
    return found


_FUNCTIONS = {**_functions(_CREATE + _LIKE + _ARITHMETIC + _OTHERS), "_operator.getitem": operator.getitem}
_CREATES, _LIKES, _PROMOTES = (set(_functions(names)) for names in (_CREATE + _LIKE, _LIKE, _ARITHMETIC))


def computes(op: str) -> bool:
    """Whether the parties compute this operator of public numbers."""
    return op in _FUNCTIONS


def sizes_only(op: str) -> bool:
    """Whether its result is public though its operand is secret: a size, or a tensor that has only its size."""
    return op in _LIKES or op == "aten.sym_size.int"


def applies(op: str, args: Sequence[Any], secret: type[Any] = Sealed) -> bool:
    """Whether this call is one of public numbers; `secret` is the type of what is not public."""
    if op in _LIKES or op in _CREATES:
        return True
    return op in _FUNCTIONS and _has(args, Public) and not _has(args, secret)


def evaluate(op: str, args: Sequence[Any], kwargs: dict[str, Any], frac_bits: int) -> Any:
    """The value of a call that `applies`: `Public`, or a list of them.

    `dtype` among kwargs is "bool", "int64" or "float64", as capture found it.
    """
    dtype = {None: None, "bool": torch.bool, "int64": torch.int64, "float64": torch.float64}[kwargs.get("dtype")]
    rest = {k: tensors(v) for k, v in kwargs.items() if k != "dtype"}
    if op in _CREATES and dtype is not None:
        rest["dtype"] = dtype
    operands = [tensors(x) for x in args]
    if op in _PROMOTES and dtype == torch.float64:
        operands = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in operands]
    function = _FUNCTIONS[op]
    if op in _CREATES and function(*operands, **rest, device="meta").numel() > _LARGEST:
        raise UnsupportedError("a public tensor of more elements than there are in any mask")
    result = function(*operands, **rest)
    if isinstance(result, list | tuple):
        return [encoded(part, dtype, frac_bits) for part in result]
    return encoded(result, dtype, frac_bits)


def encoded(x: torch.Tensor, dtype: torch.dtype | None, frac_bits: int) -> Public:
    """A tensor as the parties hold it: truth values and integers as they are, real numbers in fixed point."""
    x = x.to(dtype or x.dtype)
    if not x.dtype.is_floating_point:
        return Public(x if x.dtype == torch.bool else x.to(torch.int64))
    x = torch.where(x <= MASKED_FROM, MASKED, x.to(torch.float64))
    if x.numel() and not bool((x.abs() < 2.0 ** (61 - frac_bits)).all()):
        raise UnsupportedError("a public number is not finite, or too large for the fixed-point range")
    return Public(torch.round(x * 2.0**frac_bits).to(torch.int64), frac_bits)


def tensors(x: Any) -> Any:
    """Public numbers as torch computes with them: truth values, int64, or float64; of a secret only the size."""
    if isinstance(x, Public):
        return x.value.double() / 2.0**x.frac_bits if x.frac_bits else x.value
    if not isinstance(x, torch.Tensor) and hasattr(x, "shape"):
        return torch.empty(x.shape)
    return [tensors(item) for item in x] if isinstance(x, list | tuple) else x


def _has(x: Any, kind: type[Any]) -> bool:
    return any(_has(item, kind) for item in x) if isinstance(x, list | tuple) else isinstance(x, kind)
