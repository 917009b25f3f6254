"""Correlated randomness, declared: a kind names fields, generic code deals them.

A kind has *free* fields, uniform on their ring, each the mask of exactly one opening (but for what others are drawn
with), and *derived* fields, functions of the free ones. Every party expands its shares of the free fields from a seed
it shares with the dealer alone; all but the last party expand their shares of the derived fields too, and the dealer
sends the last party what makes the sum right: the *corrections*, which are that party's shares. Nothing else is ever
sent, and no code here or in the dealer knows any particular kind.
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType
from typing import Any, ClassVar, TypeVar

import torch

from mpcinfer.errors import InputError, ProtocolError
from mpcinfer.protocol.types import Mask, Sealed
from mpcinfer.ring import prg
from mpcinfer.ring.domain import Ring
from mpcinfer.ring.kernels import Bilinear

Tensors = dict[str, torch.Tensor]
# by the name of a weight or a cache: at the dealer its mask B, at a party a weight's public F = W + B
FixedMasks = Callable[[str], torch.Tensor]


@dataclass(frozen=True)
class Field:
    """Shape and ring of one field."""

    shape: tuple[int, ...]
    ring: Ring

    @property
    def count(self) -> int:
        """Number of elements."""
        total = 1
        for size in self.shape:
            total *= size
        return total

    @property
    def packed_bytes(self) -> int:
        """Size of a correction."""
        return self.ring.packed_bytes(self.count)


class Kind(ABC):
    """A sort of correlation with its public parameters; subclasses are frozen dataclasses of plain data."""

    # masks of a weight: kept by the dealer for as long as the deployment lives, for the products that refer to it
    lasting: ClassVar[bool] = False
    # masks of new rows of a cache: kept by the dealer, after those of the rows before
    growing: ClassVar[bool] = False
    # all of a kind, with the same parameters, are products with one operand: read once for as many as there are
    common: ClassVar[bool] = False
    # free fields that mask nothing: what derived fields are drawn with
    unopened: ClassVar[tuple[str, ...]] = ()

    @property
    def kept(self) -> bool:
        """Whether its masks outlive the tape: they come from another key."""
        return self.lasting or self.growing

    @property
    def operand(self) -> str:
        """The weight or the cache whose kept mask this is, or whose kept mask its derived fields are linear in."""
        return str(getattr(self, "weight", "") or getattr(self, "cache", ""))

    @abstractmethod
    def free(self) -> dict[str, Field]:
        """Uniform masks, by name."""

    def derived(self) -> dict[str, Field]:
        """Functions of the masks, by name."""
        return {}

    def derive(self, free: Tensors, fixed: FixedMasks) -> Tensors:
        """The derived fields' values from the free fields' values: all the dealer has to compute."""
        return {}

    def prepare(self, shares: Tensors, opened: FixedMasks) -> Tensors:
        """What a party makes of its shares before any input is there; `opened` gives the public F of a weight."""
        return shares

    def batched(self, count: int) -> Kind | None:
        """One correlation that is `count` of these, side by side along a new axis of each field; None if none is."""
        if self.kept or self.operand or not hasattr(self, "shape"):
            return None
        return dataclasses.replace(self, shape=(count, *self.shape))  # type: ignore[type-var]

    def multiply_adds(self) -> tuple[int, int]:
        """For estimates, of the large products that use it: those of a party online, and those before, one after the
        other, of dealer and party. Work per element is not counted."""
        return 0, 0


_KINDS: dict[str, type[Kind]] = {}
_MAX_ELEMENTS = 1 << 34  # of one field in a plan that somebody sent: 128 GiB is no honest request
KindClass = TypeVar("KindClass", bound=type[Kind])


def kind(cls: KindClass) -> KindClass:
    """Class decorator: makes a kind known by its name, so that a plan can carry it."""
    if cls.__name__ in _KINDS:
        raise ProtocolError(f"two kinds named {cls.__name__}")
    _KINDS[cls.__name__] = cls
    return cls


def to_json(item: Kind) -> dict[str, Any]:
    """Plain data for a plan."""
    return {"kind": type(item).__name__, **dataclasses.asdict(item)}  # type: ignore[call-overload]


def from_json(data: Mapping[str, Any]) -> Kind:
    """The inverse of `to_json`; InputError for anything that isn't a known kind with parameters it can have."""
    arguments = dict(data)
    cls = _KINDS.get(str(arguments.pop("kind", "")))
    if cls is None:
        raise InputError("the plan names an unknown kind of correlation; all processes must run the same version")
    names = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    if set(arguments) != names:
        raise InputError(f"wrong parameters for correlation {cls.__name__}")
    try:
        item = cls(**{k: _plain(k, v) for k, v in arguments.items()})
        fields_ = [f for fields in fields_of(item) for f in fields.values()]
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError, ArithmeticError) as error:
        raise InputError(f"impossible parameters for correlation {cls.__name__}") from error
    if any(type(size) is not int or size < 0 for f in fields_ for size in f.shape) or any(
        f.count > _MAX_ELEMENTS for f in fields_
    ):
        raise InputError(f"impossible shapes for correlation {cls.__name__}")
    return item


@lru_cache(maxsize=4096)  # a model's layers ask for the same correlations again and again
def fields_of(item: Kind) -> tuple[Mapping[str, Field], Mapping[str, Field]]:
    """The free and the derived fields. No name is both: shares of one would stand in for shares of the other."""
    free, derived = item.free(), item.derived()
    if not free.keys().isdisjoint(derived):
        raise ProtocolError(f"correlation {type(item).__name__} has a field that is both free and derived")
    return MappingProxyType(free), MappingProxyType(derived)


def _plain(name: str, value: Any) -> Any:
    if name == "op":
        return Bilinear(value["name"], _plain("", value["args"]))
    return tuple(_plain("", v) for v in value) if isinstance(value, list | tuple) else value


class Correlation(Sealed):
    """One party's shares of one correlation; masks are spent by openings, derived fields are read."""

    __slots__ = ("_derived", "_masks")

    def __init__(self, item: Kind, shares: Tensors, label: str) -> None:
        free, derived = fields_of(item)
        self._masks = {
            name: Mask(shares[name], f.ring, f"{label}.{name}") for name, f in free.items() if name not in item.unopened
        }
        self._derived = {name: shares[name] for name in derived}

    def mask(self, name: str) -> Mask:
        """A free field, to open something under."""
        return self._masks[name]

    def __getitem__(self, name: str) -> torch.Tensor:
        """This party's share of a field."""
        mask = self._masks.get(name)
        return self._derived[name] if mask is None else mask.share

    def masks(self) -> list[Mask]:
        """All free fields."""
        return list(self._masks.values())

    def __repr__(self) -> str:
        return f"Correlation(masks={list(self._masks)}, derived={list(self._derived)})"


def streams(item: Kind, name: str, key: bytes, fields: Mapping[str, Field]) -> Tensors:
    """One party's pseudo-random shares of these fields of the correlation `name`, from its tape key."""
    return {n: prg.expand(prg.derive(key, name, n), f.shape, f.ring) for n, f in fields.items()}


def expand(item: Kind, name: str, key: bytes, *, last: bool, correction: memoryview | bytes | None = None) -> Tensors:
    """One party's shares of all fields of the correlation `name`, from its tape key (and the corrections, if last)."""
    free, derived = fields_of(item)
    if not last:
        return streams(item, name, key, {**free, **derived})
    shares = streams(item, name, key, free)
    rest = memoryview(b"" if correction is None else correction)
    if len(rest) != correction_bytes(item):
        raise ProtocolError(f"the dealer sent {len(rest)} bytes where the plan asks for {correction_bytes(item)}")
    for n, f in derived.items():
        shares[n] = f.ring.unpack(rest[: f.packed_bytes], f.shape)
        rest = rest[f.packed_bytes :]
    return shares


def correction_bytes(item: Kind) -> int:
    """What the dealer sends for this correlation."""
    return sum(f.packed_bytes for f in fields_of(item)[1].values())


def free_values(item: Kind, name: str, keys: Sequence[bytes]) -> Tensors:
    """The dealer's view of the free fields: the sums of all parties' shares."""
    free = fields_of(item)[0]
    values = streams(item, name, keys[0], free)
    for key in keys[1:]:
        for n, f in free.items():
            values[n] = prg.add(prg.derive(key, name, n), values[n], f.ring)
    return values


def corrections(item: Kind, name: str, keys: Sequence[bytes], fixed: FixedMasks) -> Iterator[tuple[str, torch.Tensor]]:
    """The last party's shares of the derived fields of correlation `name`, one after the other."""
    derived = fields_of(item)[1]
    if not derived:
        return
    values = item.derive(free_values(item, name, keys), fixed)
    for n, f in derived.items():
        share = values.pop(n).to(f.ring.dtype)  # what is sent is not held
        if tuple(share.shape) != f.shape:
            raise ProtocolError(f"{type(item).__name__}.{n} has shape {tuple(share.shape)}, declared {f.shape}")
        for key in keys[:-1]:
            share = prg.sub(prg.derive(key, name, n), share, f.ring)
        yield n, share


def deal(item: Kind, name: str, keys: Sequence[bytes], fixed: FixedMasks) -> Iterator[memoryview]:
    """The corrections of correlation `name` for the last party, packed, in field order."""
    derived = fields_of(item)[1]
    for n, share in corrections(item, name, keys, fixed):
        yield derived[n].ring.pack(share)
