"""Free sizes: which sizes of its inputs a model leaves open, and whether the shapes of a request fit.

A shape entry of -k stands for the free size number k, counted from 1; in the shape of an output, 0 stands for a size
that is computed from the free ones. A free size called "batch" says that what the model makes of a row depends on that
row alone, so that a large batch may be cut into several requests. One called "rows" is the first one of all inputs
where that is not so, or not known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpcinfer.errors import InputError, ShapeError

BATCH = "batch"
ROWS = "rows"
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Size:
    """Any number from `low` to `high` (0: without limit), the same wherever it stands."""

    name: str
    low: int = 1
    high: int = 0

    def admits(self, value: int) -> bool:
        """Whether the size may be `value`."""
        return self.low <= value and (not self.high or value <= self.high)

    def __str__(self) -> str:
        if not self.high:
            return f"{self.name} at least {self.low}"
        return f"{self.name} from {self.low} to {self.high}"


def solve(sizes: Sequence[Size], declared: Sequence[tuple[str, Shape]], shapes: Sequence[Shape]) -> tuple[int, ...]:
    """What the free sizes are, given the inputs' names and declared shapes and the shapes they have.

    InputError for another number of inputs, ShapeError for shapes that do not fit or do not agree with each other.
    """
    if len(shapes) != len(declared):
        raise InputError(f"the model takes {len(declared)} inputs, not {len(shapes)}")
    values: list[int | None] = [None] * len(sizes)
    for (name, wanted), shape in zip(declared, shapes, strict=True):
        fits = len(shape) == len(wanted) and all(
            got > 0 and (sizes[-want - 1].admits(got) if want < 0 else want == got)
            for want, got in zip(wanted, shape, strict=True)
        )
        if not fits:
            raise ShapeError(f"input {name!r} has shape {list(shape)}, the model takes {described(sizes, wanted)}")
        for want, got in zip(wanted, shape, strict=True):
            if want < 0 and values[-want - 1] not in (None, got):
                what = sizes[-want - 1].name
                found = sorted({got, values[-want - 1] or got})
                plural = "batch sizes" if what == BATCH else f"sizes {what}"
                raise ShapeError(f"the inputs have different {plural}: {found}")
            if want < 0:
                values[-want - 1] = got
    return tuple(size.low if value is None else value for size, value in zip(sizes, values, strict=True))


def filled(shape: Shape, values: Sequence[int]) -> Shape:
    """A declared shape with its free sizes filled in; 0 stays where one is computed."""
    return tuple(values[-size - 1] if size < 0 else size for size in shape)


def agrees(declared: Shape, shape: Shape) -> bool:
    """Whether an output's shape is the declared one, filled in."""
    return len(declared) == len(shape) and all(want in (0, got) for want, got in zip(declared, shape, strict=True))


def described(sizes: Sequence[Size], shape: Shape) -> str:
    """A declared shape for people: "[batch, 3], batch at least 1"."""
    entries = ", ".join(sizes[-size - 1].name if size < 0 else str(size) for size in shape)
    free = [str(sizes[k]) for k in sorted({-size - 1 for size in shape if size < 0})]
    return f"[{entries}]" + "".join(f", {text}" for text in free)
