"""A data owner's inputs as what is shared of them, and all that can be wrong with them before anything is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from mpcinfer.client.model import Model, TensorSpec
from mpcinfer.errors import DtypeError, InputError, RangeError
from mpcinfer.graph.sizes import BATCH, filled, solve
from mpcinfer.ring.codec import FixedPoint, check_indices

Array = torch.Tensor | np.ndarray[Any, Any]

MAX_REQUEST_BYTES = 64 * 2**20


def encode_inputs(model: Model, inputs: Sequence[Array]) -> list[torch.Tensor]:
    """The inputs as int64 tensors in fixed point, all checks done: InputError, ShapeError, DtypeError, RangeError."""
    if len(inputs) != len(model.inputs):
        names = ", ".join(spec.name for spec in model.inputs)
        raise InputError(f"model {model.name!r} takes {len(model.inputs)} inputs ({names}), not {len(inputs)}")
    tensors = [_tensor(x, spec) for x, spec in zip(inputs, model.inputs, strict=True)]
    free_sizes(model, tensors)
    return [_encode(x, spec) for x, spec in zip(tensors, model.inputs, strict=True)]


def free_sizes(model: Model, inputs: Sequence[torch.Tensor]) -> tuple[int, ...]:
    """The free sizes of a request; InputError, ShapeError if the inputs do not fit."""
    return solve(model.sizes, [(v.name, v.shape) for v in model.inputs], [tuple(x.shape) for x in inputs])


def cut(model: Model, inputs: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The inputs cut along the batch into requests of at most MAX_REQUEST_BYTES, as are their answers."""
    free = free_sizes(model, inputs)
    size = 8 * sum(x.numel() for x in inputs)
    answer = 8 * sum(math.prod(filled(spec.shape, free)) for spec in model.outputs)
    if max(size, answer) <= MAX_REQUEST_BYTES:
        return [inputs]
    batch = next((value for s, value in zip(model.sizes, free, strict=False) if s.name == BATCH), 1)
    # only where a row of each output is made of the rows of the inputs with its number
    rows = MAX_REQUEST_BYTES // max(1, max(size, answer) // batch)
    if not rows or not all(spec.shape[:1] == (-1,) for spec in (*model.inputs, *model.outputs)) or batch == 1:
        raise InputError(
            f"the inputs take {size >> 20} MiB and the outputs {answer >> 20} MiB as shares; one request carries "
            f"{MAX_REQUEST_BYTES >> 20} MiB, and this one cannot be cut along its batch"
        )
    return [[x[first : first + rows] for x in inputs] for first in range(0, batch, rows)]


def _tensor(x: object, spec: TensorSpec) -> torch.Tensor:
    """A dense torch tensor of a real dtype."""
    if isinstance(x, np.ndarray):
        if x.dtype.kind not in "biuf":
            raise DtypeError(f"input {spec.name!r} has dtype {x.dtype}; pass real numbers (float, integer or bool)")
        wide = np.int64 if not spec.frac_bits and x.dtype.kind in "iu" else np.float64
        return torch.from_numpy(np.ascontiguousarray(x, dtype=wide).reshape(x.shape))
    if not isinstance(x, torch.Tensor):
        raise DtypeError(f"input {spec.name!r} is a {type(x).__name__}; pass a torch tensor or a numpy array")
    if x.layout != torch.strided or x.is_quantized or x.is_complex() or x.device.type == "meta":
        raise DtypeError(f"input {spec.name!r} is a {x.layout} {x.dtype} tensor on {x.device}; pass dense real numbers")
    return x


def _encode(x: torch.Tensor, spec: TensorSpec) -> torch.Tensor:
    what = f"input {spec.name!r}"
    if not spec.frac_bits:
        return check_indices(x, spec.limit, what)
    encoded = FixedPoint(spec.frac_bits).encode(x, what)
    if spec.limit and int(encoded.abs().max()) >= spec.limit * 2.0**spec.frac_bits:
        raise RangeError(
            f"{what} contains numbers of absolute value {spec.limit:g} or more; the model takes smaller ones"
        )
    return encoded
