"""ONNX files become modules that compute what onnx' own reference implementation does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch.export import export

from mpcinfer.errors import InputError, MpcInferError, UnsupportedError
from mpcinfer.models.loaded import InputSpec, Loaded, Sizes, parse_inputs
from mpcinfer.models.onnx import load

IMAGE = (2, 4, 8, 6)


def numbers(*shape: int, seed: int = 0, scale: float = 2.0) -> np.ndarray[Any, Any]:
    return np.random.default_rng(seed).uniform(-scale, scale, shape).astype(np.float32)


def positive(*shape: int, seed: int = 0) -> np.ndarray[Any, Any]:
    return np.abs(numbers(*shape, seed=seed)) + 0.25


def ints(*values: int) -> np.ndarray[Any, Any]:
    return np.array(values, dtype=np.int64)


def number(value: float) -> np.ndarray[Any, Any]:
    return np.array(value, dtype=np.float32)


def graph(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, Sequence[int | str | None]],
    constants: dict[str, np.ndarray[Any, Any]],
    outputs: Sequence[str] = ("y",),
    opset: int = 17,
    integers: Sequence[str] = (),
) -> onnx.ModelProto:
    """A model of these nodes."""
    declared = [
        helper.make_tensor_value_info(n, TensorProto.INT64 if n in integers else TensorProto.FLOAT, s)
        for n, s in inputs.items()
    ]
    made = helper.make_graph(
        list(nodes),
        "g",
        declared,
        [helper.make_empty_tensor_value_info(n) for n in outputs],
        [numpy_helper.from_array(x, n) for n, x in constants.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(made, opset_imports=imports, ir_version=8, producer_name="test")
    model = onnx.shape_inference.infer_shapes(model)
    for v in model.graph.output:  # of an operator that onnx does not know
        if not v.type.HasField("tensor_type"):
            v.CopyFrom(helper.make_tensor_value_info(v.name, TensorProto.FLOAT, next(iter(inputs.values()))))
    return model


def loaded(model: onnx.ModelProto, tmp_path: Path, *specs: str) -> Loaded:
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    return load(path, parse_inputs(specs) if specs else None)


def run(module: Any, inputs: Sequence[np.ndarray[Any, Any]]) -> list[np.ndarray[Any, Any]]:
    with torch.no_grad():
        results = module(*(torch.tensor(x) for x in inputs))
    return [x.numpy() for x in (results if isinstance(results, tuple) else (results,))]


def exported(found: Loaded, inputs: Sequence[np.ndarray[Any, Any]]) -> set[str]:
    """The operators torch.export finds, where it captures the same function."""
    assert isinstance(found.module, torch.nn.Module)
    tensors = tuple(torch.tensor(x) for x in inputs)
    program = export(found.module, tensors).run_decompositions({})
    for got, want in zip(run(program.module(), inputs), run(found.module, inputs), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-6)
    calls = [node for node in program.graph.nodes if node.op == "call_function"]
    return {str(node.target) for node in calls}


def check(
    model: onnx.ModelProto, tmp_path: Path, inputs: dict[str, np.ndarray[Any, Any]], *specs: str, atol: float = 1e-5
) -> set[str]:
    """The module equals the reference; what torch.export makes of it."""
    found = loaded(model, tmp_path, *specs)
    wanted = ReferenceEvaluator(model).run(None, inputs)
    got = run(found.module, list(inputs.values()))
    assert len(got) == len(wanted)
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == np.asarray(b).shape
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol)
    return exported(found, list(inputs.values()))


X = numbers(*IMAGE)
# operator, operands beside x, attributes, opsets
Case = tuple[str, list[Any], dict[str, Any], Sequence[int]]
ALL = (11, 13, 17)
CASES: dict[str, Case] = {
    **{
        op: (op, [], {}, ALL)
        for op in "Abs Neg Relu Sigmoid Tanh Erf Softplus Softsign Exp Elu Selu Celu LeakyRelu HardSigmoid "
        "ThresholdedRelu Identity Flatten Transpose GlobalAveragePool GlobalMaxPool Dropout".split()
        if op != "Celu"
    },
    "Celu": ("Celu", [], {"alpha": 1.5}, (12, 17)),
    "HardSwish": ("HardSwish", [], {}, (14, 17)),
    "Elu, alpha": ("Elu", [], {"alpha": 0.5}, ALL),
    "Selu, own": ("Selu", [], {"alpha": 2.0, "gamma": 3.0}, ALL),
    "LeakyRelu, alpha": ("LeakyRelu", [], {"alpha": 0.3}, ALL),
    "HardSigmoid, own": ("HardSigmoid", [], {"alpha": 0.3, "beta": 0.4}, ALL),
    "PRelu": ("PRelu", [numbers(4, 1, 1, seed=1)], {}, ALL),
    "PRelu, one": ("PRelu", [numbers(1, seed=1)], {}, ALL),
    "Clip": ("Clip", [number(-0.5), number(1)], {}, ALL),
    "Clip, low": ("Clip", [number(0)], {}, ALL),
    "Clip, high": ("Clip", [None, number(0.5)], {}, ALL),
    "Clip, open": ("Clip", [number(0), number(np.finfo(np.float32).max)], {}, ALL),
    "Pow": ("Pow", [number(2)], {}, ALL),
    "Pow, vector": ("Pow", [number(3).reshape(1)], {}, ALL),
    **{f"{op}, number": (op, [number(1.5)], {}, ALL) for op in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Sum", "Mean")},
    **{
        f"{op}, tensor": (op, [positive(4, 1, 6, seed=1)], {}, ALL)
        for op in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Sum", "Mean")
    },
    "three": ("Sum", [numbers(6), numbers(8, 1)], {}, ALL),
    "MatMul": ("MatMul", [numbers(6, 5)], {}, ALL),
    "Softmax": ("Softmax", [], {}, ALL),
    "Softmax, last": ("Softmax", [], {"axis": 3}, ALL),
    "Softmax, axis": ("Softmax", [], {"axis": 2}, ALL),
    "Softmax, all": ("Softmax", [], {"axis": 0}, ALL),
    "LogSoftmax": ("LogSoftmax", [], {}, ALL),
    "LogSoftmax, axis": ("LogSoftmax", [], {"axis": 1}, ALL),
    "BatchNormalization": (
        "BatchNormalization",
        [numbers(4, seed=1), numbers(4, seed=2), numbers(4, seed=3), positive(4, seed=4)],
        {"epsilon": 0.01},
        ALL,
    ),
    "InstanceNormalization": ("InstanceNormalization", [numbers(4, seed=1), numbers(4, seed=2)], {}, ALL),
    "LayerNormalization": ("LayerNormalization", [numbers(6, seed=1), numbers(6, seed=2)], {}, (17,)),
    "LayerNormalization, axes": ("LayerNormalization", [numbers(8, 6, seed=1)], {"axis": 2, "epsilon": 0.1}, (17,)),
    "LpNormalization": ("LpNormalization", [], {"axis": 1}, ALL),
    "LpNormalization, 1": ("LpNormalization", [], {"p": 1}, ALL),
    **{
        f"{op}, {name}": (op, [], attributes, ALL)
        for op in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare")
        for name, attributes in {
            "all": {},
            "axes": {"axes": [1, -1]},
            "dropped": {"axes": [2], "keepdims": 0},
        }.items()
    },
    "ReduceSum": ("ReduceSum", [], {"axes": [1, 2], "keepdims": 0}, (11, 12)),
    "ReduceSum, operand": ("ReduceSum", [ints(1, 2)], {"keepdims": 0}, (13, 17)),
    "ReduceSum, none": ("ReduceSum", [], {"noop_with_empty_axes": 1}, (13, 17)),
    "ArgMax": ("ArgMax", [], {"axis": 1}, ALL),
    "ArgMax, dropped": ("ArgMax", [], {"axis": -1, "keepdims": 0}, ALL),
    "Transpose, order": ("Transpose", [], {"perm": [0, 2, 3, 1]}, ALL),
    "Reshape": ("Reshape", [ints(0, -1, 3)], {}, ALL),
    "Flatten, 0": ("Flatten", [], {"axis": 0}, ALL),
    "Flatten, 2": ("Flatten", [], {"axis": 2}, ALL),
    "Flatten, -1": ("Flatten", [], {"axis": -1}, ALL),
    "Unsqueeze": ("Unsqueeze", [], {"axes": [1, -1]}, (11, 12)),
    "Unsqueeze, operand": ("Unsqueeze", [ints(-1, 0)], {}, (13, 17)),
    "Expand": ("Expand", [ints(3, 1, 1, 8, 1)], {}, ALL),
    "Tile": ("Tile", [ints(1, 2, 1, 3)], {}, ALL),
    "Slice": ("Slice", [ints(1, -4), ints(2**62, -1), ints(1, 2)], {}, ALL),
    "Slice, first axes": ("Slice", [ints(0, 1), ints(1, 3)], {}, ALL),
    "Slice, steps": ("Slice", [ints(0, -1), ints(100, -(2**62)), ints(3, 2), ints(2, -3)], {}, ALL),
    "Gather, one": ("Gather", [np.array(2)], {"axis": 1}, ALL),
    "Gather, run": ("Gather", [ints(1, 3)], {"axis": 1}, ALL),
    "Gather, any": ("Gather", [ints(3, 2, 0, 0, -1, 4)], {"axis": 2}, ALL),
    "Gather, matrix": ("Gather", [ints(3, 1, 0, 2).reshape(2, 2)], {"axis": 1}, ALL),
    "Pad": ("Pad", [ints(0, 0, 1, 2, 0, 0, 0, 3), number(1.5)], {}, ALL),
    "Pad, channels": ("Pad", [ints(0, 1, 0, 0, 0, 2, 0, 0)], {"mode": "constant"}, ALL),
    "Pad, crop": ("Pad", [ints(0, 0, -1, 0, 0, 0, 0, -2)], {}, ALL),
    "Pad, reflect": ("Pad", [ints(0, 0, 1, 2, 0, 0, 0, 3)], {"mode": "reflect"}, ALL),
    "Pad, edge": ("Pad", [ints(0, 0, 1, 2, 0, 0, 0, 3)], {"mode": "edge"}, ALL),
    "Pad, none": ("Pad", [ints(0, 0, 0, 0, 0, 0, 0, 0)], {}, ALL),
    "Concat": ("Concat", [numbers(2, 1, 8, 6)], {"axis": 1}, ALL),
    "DepthToSpace": ("DepthToSpace", [], {"blocksize": 2}, ALL),
    "DepthToSpace, CRD": ("DepthToSpace", [], {"blocksize": 2, "mode": "CRD"}, ALL),
    "SpaceToDepth": ("SpaceToDepth", [], {"blocksize": 2}, ALL),
    "Conv": ("Conv", [numbers(5, 4, 3, 3), numbers(5)], {"strides": [2, 1], "pads": [1, 0, 1, 0]}, ALL),
    "Conv, asymmetric": ("Conv", [numbers(5, 4, 3, 2)], {"pads": [0, 1, 2, 0]}, ALL),
    "Conv, dilated": ("Conv", [numbers(5, 4, 3, 2)], {"dilations": [2, 3]}, ALL),
    "Conv, grouped": ("Conv", [numbers(6, 2, 3, 3), numbers(6)], {"group": 2}, ALL),
    **{
        f"Conv, {pad}": ("Conv", [numbers(5, 4, 3, 2)], {"auto_pad": pad, "strides": [3, 2]}, ALL)
        for pad in ("SAME_UPPER", "SAME_LOWER", "VALID")
    },
    "ConvTranspose": ("ConvTranspose", [numbers(4, 5, 3, 2), numbers(5)], {"strides": [2, 3]}, ALL),
    "ConvTranspose, padded": (
        "ConvTranspose",
        [numbers(4, 5, 3, 3)],
        {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 0]},
        ALL,
    ),
    "ConvTranspose, asymmetric": (
        "ConvTranspose",
        [numbers(4, 5, 3, 3), numbers(5)],
        {"strides": [2, 2], "pads": [0, 1, 2, 1]},
        ALL,
    ),
    "ConvTranspose, dilated": ("ConvTranspose", [numbers(4, 5, 3, 3)], {"dilations": [2, 1]}, ALL),
    "ConvTranspose, grouped": ("ConvTranspose", [numbers(4, 3, 3, 3)], {"group": 2, "strides": [2, 2]}, ALL),
    "ConvTranspose, shape": (
        "ConvTranspose",
        [numbers(4, 5, 3, 3)],
        {"strides": [2, 2], "output_shape": [16, 12]},
        ALL,
    ),
    "MaxPool": ("MaxPool", [], {"kernel_shape": [2, 3], "strides": [2, 1]}, ALL),
    "MaxPool, padded": ("MaxPool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, ALL),
    "MaxPool, asymmetric": ("MaxPool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}, ALL),
    "MaxPool, ceil": ("MaxPool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, ALL),
    "MaxPool, dilated": ("MaxPool", [], {"kernel_shape": [2, 2], "dilations": [2, 3]}, ALL),
    "MaxPool, SAME_UPPER": (
        "MaxPool",
        [],
        {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
        ALL,
    ),
    "AveragePool": ("AveragePool", [], {"kernel_shape": [2, 3], "strides": [2, 1]}, ALL),
    "AveragePool, padded": (
        "AveragePool",
        [],
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1},
        ALL,
    ),
    "AveragePool, not counted": (
        "AveragePool",
        [],
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
        ALL,
    ),
    "AveragePool, asymmetric": (
        "AveragePool",
        [],
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]},
        ALL,
    ),
    "AveragePool, asymmetric, counted": (
        "AveragePool",
        [],
        {"kernel_shape": [3, 3], "strides": [1, 1], "pads": [0, 0, 1, 1], "count_include_pad": 1},
        ALL,
    ),
    "Resize": ("Resize", [None, np.array([1, 1, 2, 3], np.float32)], {"mode": "nearest"}, ALL),
    "Resize, asymmetric": (
        "Resize",
        [None, np.array([1, 1, 2, 2], np.float32)],
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        ALL,
    ),
    "Resize, sizes": (
        "Resize",
        [None, None, ints(2, 4, 16, 3)],
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        (13, 17),
    ),
    "Resize, smaller": ("Resize", [None, np.array([1, 1, 0.5, 1.5], np.float32)], {"mode": "nearest"}, ALL),
    "Einsum": ("Einsum", [numbers(6, 5)], {"equation": "nchw,wd->nhcd"}, (12, 17)),
    "Einsum, batched": ("Einsum", [numbers(2, 4, 8, 3)], {"equation": "nchw,nchd->ncwd"}, (12, 17)),
    "com.microsoft.Gelu": ("com.microsoft.Gelu", [], {}, (17,)),
}


@pytest.mark.parametrize(("name", "opset"), [(name, opset) for name, case in CASES.items() for opset in case[3]])
def test_operator(name: str, opset: int, tmp_path: Path) -> None:
    op, operands, attributes, _ = CASES[name]
    names = ["" if value is None else f"c{i}" for i, value in enumerate(operands)]
    domain, _, kind = op.rpartition(".")
    node = helper.make_node(kind, ["x", *names], ["y"], name="it", domain=domain, **attributes)
    constants = {f"c{i}": value for i, value in enumerate(operands) if value is not None}
    model = graph([node], {"x": IMAGE}, constants, opset=opset)
    if domain:
        want = torch.nn.functional.gelu(torch.tensor(X)).numpy()
        np.testing.assert_allclose(run(loaded(model, tmp_path).module, [X])[0], want, atol=1e-6)
        return
    check(model, tmp_path, {"x": X})
