"""Malformed messages: what hypothesis draws from a valid one, field by field and byte by byte."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from google.protobuf.descriptor import FieldDescriptor
from hypothesis import strategies as st

Draw = Callable[[st.SearchStrategy[Any]], Any]

_SIZES = [0, 1, 2, 15, 16, 17, 31, 32, 33, 255, 4096]
_NUMBERS = [0, 1, 2, 3, 7, 63, 64, 127, 128, 4096, 1 << 16, (1 << 31) - 1, (1 << 32) - 1, (1 << 62), (1 << 63) - 1]
_TEXTS = ["", "m", "g", "é\u0000\u202e", "../../m", "a" * 300, "0" * 64, "{}", "owner/alice"]
_INTEGERS = {
    FieldDescriptor.TYPE_INT32: (-(1 << 31), (1 << 31) - 1),
    FieldDescriptor.TYPE_INT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.TYPE_SINT64: (-(1 << 63), (1 << 63) - 1),
    FieldDescriptor.TYPE_UINT32: (0, (1 << 32) - 1),
    FieldDescriptor.TYPE_UINT64: (0, (1 << 64) - 1),
    FieldDescriptor.TYPE_FIXED64: (0, (1 << 64) - 1),
}
_LENGTHS = [
    b"\xff\xff\xff\xff\x07",
    b"\xff\xff\xff\xff\xff\xff\xff\xff\x7f",
    b"\xff" * 10 + b"\x01",
    b"\x80\x80\x80\x80\x10",
]


def malformed(draw: Draw, valid: Any) -> bytes:
    """A message of the type of `valid`, with something wrong with it; or no message at all."""
    message = type(valid)()
    message.CopyFrom(valid)
    how = draw(st.sampled_from(["fields", "fields", "fields", "bytes", "cut", "length", "noise", "empty", "both"]))
    if how in ("fields", "both"):
        for _ in range(draw(st.integers(1, 3))):
            _change(draw, message)
    raw = bytearray(message.SerializeToString())
    if how in ("bytes", "both") and raw:
        for _ in range(draw(st.integers(1, 4))):
            raw[draw(st.integers(0, len(raw) - 1))] = draw(st.integers(0, 255))
    elif how == "cut":
        del raw[draw(st.integers(0, max(0, len(raw) - 1))) :]
    elif how == "length":  # a field that says it is larger than anything
        tag = draw(st.sampled_from([b"\x0a", b"\x12", b"\x22", b"\x3a", b"\xfa\x01"]))
        at = draw(st.integers(0, len(raw)))
        raw[at:at] = tag + draw(st.sampled_from(_LENGTHS))
    elif how == "noise":
        raw = bytearray(draw(st.binary(max_size=300)))
    elif how == "empty":
        raw.clear()
    return bytes(raw)


def disordered(draw: Draw, valid: Sequence[Any]) -> list[bytes]:
    """A stream of messages, left out, repeated, in another order, and some of them malformed."""
    order = draw(st.lists(st.integers(0, len(valid) - 1), max_size=6)) if valid else []
    return [
        malformed(draw, valid[i]) if draw(st.booleans()) else valid[i].SerializeToString() for i in order or range(1)
    ]


def _change(draw: Draw, message: Any) -> None:
    """Change one field, some levels down."""
    field = draw(st.sampled_from(list(message.DESCRIPTOR.fields))) if message.DESCRIPTOR.fields else None
    if field is None:
        return
    if draw(st.integers(0, 5)) == 0:
        message.ClearField(field.name)
    elif field.is_repeated:
        items = getattr(message, field.name)
        if field.type == FieldDescriptor.TYPE_MESSAGE:
            if items and draw(st.booleans()):
                _change(draw, items[draw(st.integers(0, len(items) - 1))])
            else:
                _change(draw, items.add())
        elif items and draw(st.booleans()):
            items[draw(st.integers(0, len(items) - 1))] = _scalar(draw, field)
        else:
            items.extend([_scalar(draw, field)] * draw(st.sampled_from([1, 2, 9, 70])))
    elif field.type == FieldDescriptor.TYPE_MESSAGE:
        inner = getattr(message, field.name)
        inner.SetInParent()
        _change(draw, inner)
    else:
        setattr(message, field.name, _scalar(draw, field))


def _scalar(draw: Draw, field: Any) -> Any:
    if field.type in _INTEGERS:
        low, high = _INTEGERS[field.type]
        number = draw(st.one_of(st.sampled_from(_NUMBERS + [-n for n in _NUMBERS]), st.integers(low, high)))
        return max(low, min(high, number))
    if field.type == FieldDescriptor.TYPE_STRING:
        return draw(st.one_of(st.sampled_from(_TEXTS), st.text(max_size=40)))
    if field.type == FieldDescriptor.TYPE_BYTES:
        return draw(st.one_of(st.binary(max_size=64), st.sampled_from(_SIZES).map(bytes)))
    if field.type == FieldDescriptor.TYPE_BOOL:
        return draw(st.booleans())
    if field.type == FieldDescriptor.TYPE_ENUM:
        return draw(st.integers(0, 99))
    return draw(st.floats())
