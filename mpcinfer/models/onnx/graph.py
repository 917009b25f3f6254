"""An ONNX file as plain data: nodes in order, what is known of their operands, what of it is the owner's secret."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.checker
import onnx.inliner
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from mpcinfer.errors import InputError, UnsupportedError

OPSETS = range(11, 18)

FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16)
INTEGERS = (TensorProto.INT64, TensorProto.INT32)

# what is computed while loading where all operands are known; Shape and Size need to know no more than a shape
FOLDABLE = frozenset(
    """
    Abs Add And ArgMax Cast Ceil Clip Concat ConstantOfShape Cos CumSum Div Equal Erf Exp Expand EyeLike Flatten Floor
    Gather GatherElements GatherND Greater GreaterOrEqual Identity IsInf IsNaN Less LessOrEqual Log Max Min Mod Mul Neg
    NonZero Not OneHot Or Pad Pow Range Reciprocal ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum Reshape Round
    ScatterElements ScatterND Shape Sign Sin Size Slice Split Sqrt Squeeze Sub Sum Tanh Tile Transpose Trilu Unsqueeze
    Where Xor
    """.split()
)
_SHAPES = ("Shape", "Size")
_SAME = ("Identity", "Dropout")

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Node:
    """One operator; those of other domains are named domain.Operator, operands left out are ""."""

    op: str
    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class GraphInput:
    """What the file says of an input: sizes are numbers, or names of free ones."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass
class Graph:
    """`known` holds initializers, constants, and what follows from them; `secret` are those of them nobody may see.

    Secret are tensors of floating-point numbers. Single numbers (rank 0), integers and attributes are architecture.
    """

    producer: str
    opset: int
    inputs: tuple[GraphInput, ...]
    outputs: tuple[str, ...]
    nodes: list[Node]
    known: dict[str, Array]
    secret: set[str]
    dtypes: dict[str, int]
    ranks: dict[str, int]

    def public(self, name: str) -> Array | None:
        """A known value that is no secret."""
        return None if name in self.secret else self.known.get(name)

    def number(self, name: str) -> float | None:
        """A public operand that is one number."""
        value = self.public(name)
        return float(value.reshape(())) if value is not None and value.size == 1 and value.dtype != np.bool_ else None

    def uses(self) -> dict[str, int]:
        """How often each value is used, as an operand or as an output."""
        counts: dict[str, int] = {}
        for name in [name for node in self.nodes for name in node.inputs] + list(self.outputs):
            counts[name] = counts.get(name, 0) + 1
        return counts

    def drop_unused(self) -> None:
        """Without nodes that no output depends on."""
        wanted, kept = set(self.outputs), []
        for node in reversed(self.nodes):
            if wanted.intersection(node.outputs):
                wanted.update(node.inputs)
                kept.append(node)
        self.nodes = kept[::-1]
        self.known = {name: x for name, x in self.known.items() if name in wanted}


def read(path: Path) -> Graph:
    """The file, checked by onnx, with constants folded.

    InputError for what is no valid ONNX file, UnsupportedError for opsets outside 11 to 17 and for strings.
    """
    try:
        model = onnx.load(str(path))
        opset = {o.domain or "ai.onnx": o.version for o in model.opset_import}.get("ai.onnx")
    except Exception as error:  # of the parser's own type
        raise InputError(f"{path.name} is not an ONNX file, or it or a file of weights beside it is damaged") from error
    if opset is None or not model.graph.node:
        raise InputError(f"{path.name} is not an ONNX file, or an empty one")
    if opset not in OPSETS:
        raise UnsupportedError(
            f"{path.name} has opset {opset}; supported are {OPSETS[0]} to {OPSETS[-1]}: export it with one of these"
        )
    try:
        onnx.checker.check_model(str(path))
        if model.functions:
            model = onnx.inliner.inline_local_functions(model)
        inferred = onnx.shape_inference.infer_shapes(model).graph if model.ByteSize() < 1 << 30 else model.graph
    except Exception as error:  # of many types
        raise InputError(f"{path.name} is not a valid ONNX file: {_first_line(error)}") from error
    graph = model.graph
    infos = [*inferred.value_info, *inferred.input, *inferred.output]
    known = {t.name: _array(t) for t in graph.initializer}
    result = Graph(
        producer=model.producer_name,
        opset=opset,
        inputs=tuple(_input(v) for v in graph.input if v.name not in known),
        outputs=tuple(v.name for v in graph.output),
        nodes=[],
        known=known,
        secret={name for name, x in known.items() if _is_secret(x)},
        dtypes={v.name: v.type.tensor_type.elem_type for v in infos} | {t.name: t.data_type for t in graph.initializer},
        ranks={v.name: len(v.type.tensor_type.shape.dim) for v in infos if v.type.tensor_type.HasField("shape")},
    )
    result.ranks.update((name, x.ndim) for name, x in known.items())
    for i, proto in enumerate(graph.node):
        node = _node(proto, i)
        if node.op == "Constant":
            (value,) = node.attributes.values()
            known[node.outputs[0]] = _plain_floats(np.asarray(value))
            result.ranks[node.outputs[0]] = known[node.outputs[0]].ndim
            if _is_secret(known[node.outputs[0]]):
                result.secret.add(node.outputs[0])
        else:
            result.nodes.append(node)
    fold(result)
    return result


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message")[:300]


def _is_secret(x: Array) -> bool:
    return x.ndim > 0 and x.dtype.kind == "f"


def _plain_floats(x: Array) -> Array:
    """float32 whatever the file has: a model has one floating-point type here."""
    return x.astype(np.float32) if x.dtype.kind == "f" or x.dtype.name == "bfloat16" else x


def _array(tensor: TensorProto) -> Array:
    if tensor.data_type == TensorProto.STRING:
        raise UnsupportedError(f"the constant {tensor.name!r} holds strings; tensors are numbers")
    return _plain_floats(numpy_helper.to_array(tensor))


def _node(proto: onnx.NodeProto, position: int) -> Node:
    op = proto.op_type if proto.domain in ("", "ai.onnx") else f"{proto.domain}.{proto.op_type}"
    name = proto.name or f"{proto.op_type}_{position}"
    attributes = {a.name: _attribute(a, op, name) for a in proto.attribute}
    inputs = list(proto.input)
    while inputs and not inputs[-1]:  # operands left out at the end
        inputs.pop()
    if op == "Split" and len(inputs) < 2 and "split" not in attributes:
        attributes["num_outputs"] = len(proto.output)
    return Node(op, name, tuple(inputs), tuple(proto.output), attributes)


def _attribute(attribute: onnx.AttributeProto, op: str, name: str) -> Any:
    value = helper.get_attribute_value(attribute)
    if op == "Constant" and attribute.name not in ("value", "value_float", "value_floats", "value_int", "value_ints"):
        raise UnsupportedError(f"Constant at {name}: {attribute.name}; constants are dense tensors of numbers")
    if isinstance(value, TensorProto):
        return _array(value)
    return value.decode() if isinstance(value, bytes) else list(value) if isinstance(value, Sequence) else value


def _input(value: onnx.ValueInfoProto) -> GraphInput:
    kind = value.type.tensor_type
    if kind.elem_type not in (*FLOATS, *INTEGERS):
        named = TensorProto.DataType.Name(kind.elem_type) if value.type.HasField("tensor_type") else "no tensor"
        raise UnsupportedError(f"input {value.name!r} is {named}; inputs are floating-point numbers or int64 indices")
    if not kind.HasField("shape"):
        raise InputError(f"the file says nothing of the shape of input {value.name!r}: export it with shapes")
    dims = (d.dim_value if d.dim_value > 0 else d.dim_param or "?" for d in kind.shape.dim)
    return GraphInput(value.name, "float" if kind.elem_type in FLOATS else "int", tuple(dims))


def fold(graph: Graph) -> None:
    """Compute what depends on known operands alone, and leave out what only hands on its operand."""
    same: dict[str, str] = {}
    nodes: list[Node] = []
    for node in graph.nodes:
        inputs = tuple(same.get(name, name) for name in node.inputs)
        node = Node(node.op, node.name, inputs, node.outputs, node.attributes)
        if _hands_on(node, graph) and node.outputs[0] not in graph.outputs:
            same[node.outputs[0]] = inputs[0]
        elif node.op in FOLDABLE and inputs and all(not name or name in graph.known for name in inputs):
            values = evaluate(node, [graph.known.get(name) for name in inputs], graph.opset)
            hidden = node.op not in _SHAPES and not graph.secret.isdisjoint(inputs)
            for name, value in zip(node.outputs, values, strict=True):
                graph.known[name], graph.ranks[name] = _plain_floats(value), value.ndim
                if hidden and value.dtype.kind == "f":
                    graph.secret.add(name)
        else:
            nodes.append(node)
    graph.nodes = nodes


def _hands_on(node: Node, graph: Graph) -> bool:
    """Whether the node's first output is its first operand: identities, and casts from one float type to another."""
    if node.op in _SAME:
        training = graph.public(node.inputs[2]) if len(node.inputs) > 2 else None
        return len(node.inputs) < 3 or (training is not None and not training)
    return node.op == "Cast" and node.attributes["to"] in FLOATS and graph.dtypes.get(node.inputs[0]) in FLOATS


def evaluate(node: Node, operands: Sequence[Array | None], opset: int) -> list[Array]:
    """A node's values on known operands, by onnx' own reference implementation."""
    attributes: dict[str, Any] = dict(node.attributes)
    attributes.update((k, numpy_helper.from_array(v)) for k, v in attributes.items() if isinstance(v, np.ndarray))
    if node.op == "Split":
        attributes.pop("num_outputs", None)
    names = [name and f"in{i}" for i, name in enumerate(node.inputs)]
    proto = helper.make_node(node.op, names, [name and f"out{i}" for i, name in enumerate(node.outputs)], **attributes)
    feeds = {name: x for name, x in zip(names, operands, strict=True) if x is not None}
    unknown = helper.make_empty_tensor_value_info
    graph = helper.make_graph([proto], "node", [unknown(n) for n in feeds], [unknown(n) for n in proto.output if n])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    try:
        return [np.asarray(x) for x in ReferenceEvaluator(model).run(None, feeds)]
    except Exception as error:  # of many types
        raise InputError(f"{node.op} at {node.name}: cannot be computed ({_first_line(error)})") from error


def derived(graph: Graph) -> set[str]:
    """Names of what depends on the inputs' shapes but not on their values: computed while the module is traced."""
    names: set[str] = set()
    for node in graph.nodes:
        free = all(not n or n in names or graph.public(n) is not None for n in node.inputs)
        if node.op in _SHAPES or (node.op in FOLDABLE and node.inputs and free):
            names.update(node.outputs)
    return names


def of_shapes(node: Node, operands: Sequence[Any], opset: int) -> list[Array]:
    """The value of a node that `derived` names; a tensor counts by its shape only."""
    if node.op in _SHAPES:
        shape = np.array(list(operands[0].shape), dtype=np.object_)
        sizes = shape[slice(node.attributes.get("start", 0), node.attributes.get("end"))]
        return [_settled(sizes if node.op == "Shape" else np.prod(shape))]
    if all(x is None or x.dtype != np.object_ for x in operands):
        return evaluate(node, operands, opset)
    if node.op not in _ON_FREE_SIZES:
        raise UnsupportedError("is computed from a free size; give the size a number with --inputs")
    return [_settled(_ON_FREE_SIZES[node.op](*operands, **node.attributes))]


def _settled(x: Any) -> Array:
    """Objects, torch's symbols of free sizes among them; numbers where none is left."""
    array = x if isinstance(x, np.ndarray) else np.asarray(x, dtype=np.object_)
    if array.dtype != np.object_ or not all(isinstance(s, int | np.integer) for s in array.flat):
        return array
    return array.astype(np.int64)


def _sliced(x: Array, starts: Array, ends: Array, axes: Array | None = None, steps: Array | None = None) -> Array:
    at = [slice(None)] * x.ndim
    for i, axis in enumerate(range(len(starts)) if axes is None else axes.tolist()):
        at[axis] = slice(int(starts[i]), int(ends[i]), 1 if steps is None else int(steps[i]))
    return x[tuple(at)]


def _axes(axes: Any) -> tuple[int, ...]:
    return tuple(np.asarray(axes).reshape(-1).tolist())


# the arithmetic of shapes, on arrays that hold symbols
_ON_FREE_SIZES: dict[str, Callable[..., Array]] = {
    "Add": lambda a, b: a + b,
    "Sub": lambda a, b: a - b,
    "Mul": lambda a, b: a * b,
    "Div": lambda a, b: a // b,
    "Cast": lambda x, to: x,
    "Concat": lambda *xs, axis: np.concatenate(xs, axis),
    "Equal": lambda a, b: np.vectorize(lambda s, t: bool(s == t), otypes=[np.bool_])(a, b),
    "Where": lambda c, a, b: np.asarray(np.where(c, a, b)),
    "Gather": lambda x, i, axis=0: np.take(x, i.astype(np.int64), axis),
    "Identity": lambda x: x,
    "ReduceProd": lambda x, axes=None, keepdims=1: np.prod(x, keepdims=bool(keepdims)),
    "Reshape": lambda x, shape, allowzero=0: x.reshape(shape.tolist()),
    "Slice": _sliced,
    "Squeeze": lambda x, axes=None: np.squeeze(x, None if axes is None else _axes(axes)),
    "Unsqueeze": lambda x, axes: np.expand_dims(x, _axes(axes)),
}
