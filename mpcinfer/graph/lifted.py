"""One run for several requests: what is secret of each gets an axis in front, with an entry for every request.

The axis is not the model's. Whoever deploys a model has no say in it, and no operator computes along it, so that
nothing of one request gets into another one's answer. What an operator does with its operands' other axes is said in a
table; what stands in no table is evaluated for one request after the other, side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from mpcinfer.errors import UnsupportedError
from mpcinfer.protocol.context import Begun, Context, together, whole
from mpcinfer.protocol.types import Public, Sealed, Shared, Weight

_ATTENTION = "aten.scaled_dot_product_attention.default"
Rule = Callable[..., Any]
Call = tuple[list[Any], dict[str, Any]]


class Lifted(Sealed):
    """Values of several requests, one beside the other: `value` has an axis more than each of them, in front.

    lengths: of caches, how many rows each has; what stands before them is none.
    """

    __slots__ = ("lengths", "value")

    def __init__(self, value: Any, lengths: tuple[int, ...] = ()) -> None:
        self.value = value
        self.lengths = lengths

    @property
    def count(self) -> int:
        """Of how many requests."""
        return int(self.value.shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """What one of them has: public."""
        return tuple(self.value.shape[1:])

    def __repr__(self) -> str:
        return f"Lifted({self.value!r})"

    def of(self, i: int) -> Any:
        """That of one request."""
        if isinstance(self.value, Public):
            return Public(self.value.value[i], self.value.frac_bits)
        if not isinstance(self.value, Shared):
            raise UnsupportedError("an operator that is evaluated for one text after the other and is given a cache")
        return self.value.map(lambda t: t[i])


def lifted(values: Sequence[Shared]) -> Lifted:
    """The same value of several requests; all of one shape and scale."""
    return Lifted(Shared(torch.stack([x.share for x in values]), values[0].frac_bits))


class Each:
    """Public values that differ from one request to the other: sizes of caches, and what is made of them."""

    def __init__(self, values: Sequence[Any]) -> None:
        self.values = values

    def lifted(self, ragged: bool = False) -> Lifted:
        """Side by side. ragged: they may have different sizes; then zeros stand in front."""
        if not all(isinstance(x, Public) for x in self.values):
            raise UnsupportedError(
                "an operator that is told the number of rows of a cache, which differs between texts"
            )
        tensors = [x.value for x in self.values]
        sizes = [max(size) for size in zip(*(t.shape for t in tensors), strict=True)]
        found = tensors[0].new_zeros((len(tensors), *sizes))
        for i, t in enumerate(tensors):
            if list(t.shape) != sizes and not ragged:
                raise UnsupportedError("a public tensor whose size differs between texts, and which is no mask")
            found[(i, *(slice(size - own, size) for size, own in zip(sizes, t.shape, strict=True)))] = t
        return Lifted(Public(found, self.values[0].frac_bits))


def differing(*values: Any) -> int:
    """For how many requests the arguments differ in public; 0 if they do not."""
    for x in values:
        if isinstance(x, Each):
            return len(x.values)
        if isinstance(x, list | tuple) and (found := differing(*x)):
            return found
    return 0


def secret(*values: Any) -> bool:
    """Whether there is anything secret among the arguments."""
    return any(secret(*x) if isinstance(x, list | tuple) else isinstance(x, Sealed) for x in values)


def several(*values: Any) -> int:
    """Of how many requests the values in these arguments are; 0 for what is the same for all."""
    for x in values:
        if isinstance(x, Lifted):
            return x.count
        if isinstance(x, list | tuple) and (found := several(*x)):
            return found
    return 0


async def apply(rule: Rule, op: str, ctx: Context, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """What a registered rule makes of arguments some of which are `Lifted`: the same of what each of them has."""
    if op == "_operator.getitem":
        return await rule(ctx, *args, **kwargs)
    if op == "aten.sym_size.int":
        return _size(args[0], args[1])
    if op == "mpc.append":
        return await _append(rule, ctx, *args)
    if differing(*args, *kwargs.values()):
        args = [_side_by_side(x, op) for x in args]
        kwargs = {name: _side_by_side(x, op) for name, x in kwargs.items()}
    prepare = _PREPARE.get(op)
    call = prepare(args, kwargs) if prepare is not None else None
    if call is not None:
        return _wrapped(await rule(ctx, *call[0], **call[1]))
    if op in _OF_ROWS and isinstance(args[0], Lifted) and not several(*args[1:], *kwargs.values()):
        return await _rowwise(rule, ctx, args, kwargs, _OF_ROWS[op])
    return await _one_by_one(rule, ctx, args, kwargs)


def _size(x: Any, dim: int) -> Any:
    """A size, or those of the requests. How many rows of a cache there are is never taken to be the same for all."""
    if isinstance(x, Lifted) and x.lengths and dim % len(x.shape) == len(x.shape) - 2:
        return Each(x.lengths)
    return x.shape[dim]


async def _append(rule: Rule, ctx: Context, cache: Lifted, rows: Lifted) -> Begun:
    """Rows put below those of each text."""
    begun = await rule(ctx, cache.value, rows.value)
    return Begun(Lifted(begun.value, tuple(n + rows.shape[-2] for n in cache.lengths)), begun.rest)


def _side_by_side(x: Any, op: str) -> Any:
    if isinstance(x, list | tuple):
        return [_side_by_side(item, op) for item in x]
    # what a mask says of rows that are not there is that nobody sees them
    return x.lifted(ragged=op == _ATTENTION) if isinstance(x, Each) else x


async def _one_by_one(rule: Rule, ctx: Context, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """For each request alone."""
    count = several(*args, *kwargs.values())

    async def one(i: int) -> Any:
        own = {name: of(x, i) for name, x in kwargs.items()}
        return await whole(await rule(ctx.scope(str(i)), *(of(x, i) for x in args), **own))

    return _beside(await together(*(one(i) for i in range(count))))


async def _rowwise(rule: Rule, ctx: Context, args: list[Any], kwargs: dict[str, Any], rank: int) -> Any:
    """An operator to whom the first of `rank` axes is rows that it takes one by one: all requests' rows below another.

    Without that axis the requests themselves are its rows.
    """
    x = args[0].value
    if len(x.shape) == rank:
        return _wrapped(await rule(ctx, x, *args[1:], **kwargs))
    found = await rule(ctx, x.map(lambda t: t.flatten(0, 1)), *args[1:], **kwargs)
    parts = [y.map(lambda t: t.unflatten(0, x.shape[:2])) for y in (found if isinstance(found, list) else [found])]
    return _wrapped(parts if isinstance(found, list) else parts[0])


def of(x: Any, i: int) -> Any:
    """What one request has of these arguments."""
    if isinstance(x, list | tuple):
        return [of(item, i) for item in x]
    if isinstance(x, Each):
        return x.values[i]
    return x.of(i) if isinstance(x, Lifted) else x


def _beside(found: list[Any]) -> Any:
    if isinstance(found[0], list | tuple):
        return [_beside([each[j] for each in found]) for j in range(len(found[0]))]
    return lifted(found)


def _wrapped(found: Any) -> Any:
    if isinstance(found, list | tuple):
        return [_wrapped(each) for each in found]
    return Begun(Lifted(found.value), found.rest) if isinstance(found, Begun) else Lifted(found)


# --- operands of several requests as one operand ----------------------------------------------------------------------


def _mapped(x: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return Public(change(x.value), x.frac_bits) if isinstance(x, Public) else x.map(change)


def _rank(x: Any) -> int:
    """Of what one request has."""
    return len(x.shape) if isinstance(x, Lifted | Shared | Weight | Public) else 0


def _plain(x: Any) -> Any:
    if isinstance(x, list | tuple):
        return [_plain(item) for item in x]
    return x.value if isinstance(x, Lifted) else x


def _aligned(x: Any, rank: int) -> Any:
    """With axes of one element after the first, so that the others are broadcast as those of one request are."""
    missing = rank - _rank(x)
    if not isinstance(x, Lifted):
        return x
    if missing <= 0:
        return x.value  # the very same: a number times itself is cheaper than a product
    return _mapped(x.value, lambda t: t.reshape(t.shape[0], *([1] * missing), *t.shape[1:]))


def _last(args: list[Any], kwargs: dict[str, Any]) -> Call | None:
    """For operators of the last axes of one operand, whatever stands before them."""
    alone = isinstance(args[0], Lifted) and not several(*args[1:], *kwargs.values())
    return ([args[0].value, *args[1:]], kwargs) if alone else None


def _broadcast(args: list[Any], kwargs: dict[str, Any]) -> Call:
    """For operators of single elements."""
    rank = max(map(_rank, [*args, *kwargs.values()]))
    return [_aligned(x, rank) for x in args], {name: _aligned(x, rank) for name, x in kwargs.items()}


def _last_two(args: list[Any], kwargs: dict[str, Any]) -> Call | None:
    """For products of matrices."""
    return _broadcast(args, kwargs) if min(_rank(x) for x in args) >= 2 else None


def _attention(args: list[Any], kwargs: dict[str, Any]) -> Call | None:
    """Queries, keys and values are those of requests; a mask may be, or may be the same for all."""
    if not all(isinstance(x, Lifted) and _rank(x) == _rank(args[0]) for x in args[:3]):
        return None
    rank, mask = _rank(args[0]), args[3] if len(args) > 3 else kwargs.get("attn_mask")
    if args[1].lengths and not (isinstance(mask, Lifted) and mask.value.value.dtype == torch.bool):
        raise UnsupportedError("texts of different lengths, and no mask of truth values that says which rows they have")
    return [_aligned(x, rank) for x in args], {name: _aligned(x, rank) for name, x in kwargs.items()}


def _by_index(args: list[Any], kwargs: dict[str, Any]) -> Call | None:
    """For rows of one table."""
    return None if isinstance(args[0], Lifted) else ([_plain(x) for x in args], kwargs)


def _shifted(dim: int) -> int:
    return dim + 1 if dim >= 0 else dim


def _along(*places: tuple[int, str, Any]) -> Callable[[list[Any], dict[str, Any]], Call | None]:
    """For operators of one operand that are told axes: where each is told, and what it is if it is not told.

    An axis None, or an empty list, stands for all axes.
    """

    def prepare(args: list[Any], kwargs: dict[str, Any]) -> Call | None:
        rest = [*args[1:], *kwargs.values()]
        if several(*rest) or not isinstance(args[0], Lifted):
            return None
        args, kwargs = [args[0].value, *args[1:]], dict(kwargs)
        for at, name, default in places:
            told = args[at] if at < len(args) else kwargs.get(name, default)
            if told is None or told == []:
                new: Any = list(range(1, len(args[0].shape)))
            else:
                new = [_shifted(d) for d in told] if isinstance(told, list | tuple) else _shifted(told)
            if at < len(args):
                args[at] = new
            else:
                kwargs[name] = new
        return args, kwargs

    return prepare


def _dimensions(args: list[Any], kwargs: dict[str, Any]) -> Call | None:
    """For a permutation."""
    x, order = args
    return [x.value, [0, *(d % _rank(x) + 1 for d in order)]], kwargs


def _sizes(front: Callable[[int], int]) -> Callable[[list[Any], dict[str, Any]], Call]:
    """For operators that are told sizes; `front` is what is told of the axis in front, which has so many entries."""

    def prepare(args: list[Any], kwargs: dict[str, Any]) -> Call:
        x, sizes, *rest = args
        return [x.value, [front(x.count), *sizes], *rest], kwargs

    return prepare


def _stretched(front: Callable[[int], int]) -> Callable[[list[Any], dict[str, Any]], Call]:
    """As `_sizes`, where sizes may be told of more axes than there are."""

    def prepare(args: list[Any], kwargs: dict[str, Any]) -> Call:
        x, sizes, *rest = args
        return [_aligned(x, len(sizes)), [front(x.count), *sizes], *rest], kwargs

    return prepare


def _joined(args: list[Any], kwargs: dict[str, Any]) -> Call:
    """For concatenation: what is the same for all stands beside each."""
    parts, count = args[0], several(args[0])
    parts = [x.value if isinstance(x, Lifted) else _mapped(x, lambda t: t.expand(count, *t.shape)) for x in parts]
    dim = args[1] if len(args) > 1 else kwargs.get("dim", 0)
    return [parts, _shifted(dim)], {}


_AXIS = _along((1, "dim", 0))
_AXES = _along((1, "dim", None))
_PREPARE: dict[str, Callable[[list[Any], dict[str, Any]], Call | None]] = {}


def _table(prepare: Callable[[list[Any], dict[str, Any]], Call | None], names: str) -> None:
    for name in names.split():
        _PREPARE[name if name.startswith(("mpc.", "_operator.")) else f"aten.{name}"] = prepare


_table(
    _last,
    """
    mpc.linear mpc.tied_linear mpc.softmax mpc.argmax mpc.top_k mpc.number mpc.narrow
    layer_norm.default rms_norm.default constant_pad_nd.default pad.default pixel_shuffle.default
    clone.default _to_copy.default alias.default detach.default
    """,
)
_table(
    _broadcast,
    """
    add.Tensor add.Scalar sub.Tensor sub.Scalar rsub.Tensor rsub.Scalar mul.Tensor mul.Scalar div.Tensor div.Scalar
    _operator.add _operator.sub _operator.mul _operator.neg _operator.pow
    neg.default reciprocal.default sqrt.default rsqrt.default log.default log1p.default exp.default expm1.default
    square.default pow.Tensor_Scalar sign.default abs.default mpc.affine mpc.gate
    relu.default relu6.default leaky_relu.default hardtanh.default clamp.default clamp_min.default clamp_max.default
    clamp.Tensor clamp_min.Tensor clamp_max.Tensor threshold.default hardsigmoid.default softplus.default
    log_sigmoid.default elu.default selu.default celu.default gelu.default silu.default sigmoid.default tanh.default
    erf.default mish.default hardswish.default
    maximum.default minimum.default max.other min.other where.self where.Scalar where.ScalarOther where.ScalarSelf
    masked_fill.Scalar masked_fill.Tensor logical_not.default logical_and.default logical_or.default
    logical_xor.default bitwise_not.default bitwise_and.Tensor bitwise_or.Tensor bitwise_xor.Tensor __and__.Tensor
    __or__.Tensor __xor__.Tensor
    gt.Scalar gt.Tensor ge.Scalar ge.Tensor lt.Scalar lt.Tensor le.Scalar le.Tensor eq.Scalar eq.Tensor ne.Scalar
    ne.Tensor
    """,
)
_table(_last_two, "matmul.default bmm.default linear.default")
_table(_attention, _ATTENTION.removeprefix("aten."))
_table(_by_index, "embedding.default")
_table(_joined, "cat.default concat.default")
_table(
    _AXIS,
    """
    softmax.int _softmax.default log_softmax.int _log_softmax.default max.dim min.dim select.int slice.Tensor
    squeeze.dim squeeze.dims unsqueeze.default unbind.int index_select.default flip.default
    """,
)
_table(
    _AXES,
    """
    sum.dim_IntList sum.default mean.dim mean.default amax.default amin.default max.default min.default
    logsumexp.default var.dim var.correction std.dim std.correction
    """,
)
_table(_along((2, "dim", 0)), "split.Tensor split_with_sizes.default")
_table(_along((2, "dim", None)), "linalg_vector_norm.default")
_table(_along((2, "dim", -1)), "topk.default")
_table(_along((1, "dim", -1)), "sort.default glu.default")
_table(_along((1, "dim0", 0), (2, "dim1", 1)), "transpose.int")
_table(_dimensions, "permute.default")
_table(_sizes(lambda count: count), "view.default _unsafe_view.default")
_table(_stretched(lambda count: count), "expand.default")
_table(_stretched(lambda count: 1), "repeat.default")

# what takes its first axis for rows, and how many axes its operand then has
_OF_ROWS = {
    **{f"aten.{name}": 4 for name in "conv2d.default conv2d.padding conv_transpose2d.input".split()},
    **{f"aten.{name}": 3 for name in "conv1d.default conv1d.padding conv_transpose1d.default".split()},
    **{f"aten.{name}": 4 for name in "max_pool2d.default avg_pool2d.default adaptive_avg_pool2d.default".split()},
    **{f"aten.{name}": 4 for name in "_adaptive_avg_pool2d.default adaptive_max_pool2d.default".split()},
    **{f"aten.{name}": 3 for name in "max_pool1d.default avg_pool1d.default adaptive_avg_pool1d.default".split()},
}
