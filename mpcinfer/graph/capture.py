"""From a torch module to a Program and its weights, by torch.export, on the model owner's machine."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.utils._pytree import tree_leaves

from mpcinfer.errors import InputError, UnsupportedError
from mpcinfer.graph.bounds import with_limits
from mpcinfer.graph.caches import without_caches
from mpcinfer.graph.export import Axes, exported_program, free_size, operator_name
from mpcinfer.graph.fold import BATCH_NORM, constant_value, fold_batch_norms
from mpcinfer.graph.gain import fold_gains
from mpcinfer.graph.join import join_linears
from mpcinfer.graph.layout import EMBEDDING, lay_out
from mpcinfer.graph.probe import with_output_shapes
from mpcinfer.graph.program import REVEALS, Cache, Constant, Input, Node, Parameter, Program, Ref, Value
from mpcinfer.graph.reorder import pool_before_relu
from mpcinfer.graph.sizes import BATCH, Size
from mpcinfer.nn import lookup, public, supported, takes_integers, yields_integers
from mpcinfer.nn.shape import moves
from mpcinfer.ring.codec import FixedPoint

# where very negative numbers stand for minus infinity, that is for "masked"
_MASKS = ("aten.masked_fill.Scalar", "aten.where.ScalarOther", "aten.where.ScalarSelf", "aten.where.Scalar")
# of truth values only
_LOGIC = re.compile(r"aten\.(logical_|bitwise_|__and__|__or__|__xor__)")
_ITEM = "_operator.getitem"
_NO_MODULE = "_empty_nn_module_stack"  # what export writes where it knows none
_CASTS = ("aten._to_copy.default", "aten.to.dtype")
# over the last axis these are mpc.softmax, which `reveal` recognises
_SOFTMAX = ("aten.softmax.int", "aten._softmax.default")


@dataclass(frozen=True)
class Captured:
    """A Program and the model owner's secret: the parameters, encoded, by name."""

    program: Program
    weights: dict[str, torch.Tensor]

    def __repr__(self) -> str:
        return f"Captured({len(self.program.nodes)} nodes, {self.program.size} parameters)"


def capture(
    model: nn.Module | ExportedProgram,
    example_inputs: Sequence[torch.Tensor],
    *,
    frac_bits: int = 16,
    reveal: str = "logits",
    k: int = 5,
    public: Collection[str] = (),
    dynamic_shapes: Any = None,
    calibration: Sequence[torch.Tensor] | None = None,
) -> Captured:
    """Export `model` (in eval mode) and translate it.

    example_inputs: one tensor per argument, real ones if possible: from their range the inputs' limits are made
    (`graph.bounds`). An ExportedProgram has its own, unless others are given. Inputs of integers are secret indices of
    embeddings, such as token ids. dynamic_shapes: the sizes that stay free, as `torch.export` takes them; a Dim called
    "batch" says that rows do not influence each other. Without it the first size of all inputs becomes free where they
    share it and the model allows it, that of a batch if rows are seen not to influence each other. reveal: "logits",
    "probabilities", "top-k" (with `k`) or "argmax"; of a language model "tokens" or "logits". Inputs to which the model
    appends rows, returning them longer, are caches (see `Program`). calibration: other values than the example inputs
    to make limits from, one for each input that is no cache; caches are empty then. Parameters and persistent buffers
    are secret; non-persistent buffers, integers in the model's code, and what `public` names (as in `state_dict`) are
    public. What depends on no input is computed here; outputs that are None are left out.
    Raises InputError for a model in training mode, UnsupportedError naming every operator that has no protocol with
    its module path, RangeError for parameters that can't be encoded and for inputs that the model makes too large.
    """
    if reveal not in REVEALS:
        raise InputError(f"reveal must be one of {', '.join(REVEALS)}, not {reveal!r}")
    codec = FixedPoint(frac_bits)
    exported, axes = exported_program(model, example_inputs, dynamic_shapes)
    translated = _Translator(exported, codec, public, axes)
    program = translated.program(reveal, k)
    weights = translated.encoded(program)
    examples = dict(zip(translated.names, _examples(model, example_inputs), strict=True))
    real = calibration or [examples[v.name] for v in program.inputs]
    return Captured(with_limits(program, weights, real), weights)


def _examples(model: nn.Module | ExportedProgram, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One tensor for each of the program's inputs."""
    if isinstance(model, ExportedProgram) and not inputs:
        return [x for x in tree_leaves(model.example_inputs) if isinstance(x, torch.Tensor)]
    return list(inputs)


class _Translator:
    """Walks the exported graph once."""

    def __init__(
        self, exported: ExportedProgram, codec: FixedPoint, public: Collection[str], axes: Sequence[Axes]
    ) -> None:
        self.codec = codec
        self.inputs: list[Input] = []
        self.caches: list[Cache] = []
        self.sizes: list[Size] = []
        self.known: dict[str, Any] = {}  # parameters and what depends on them alone, in float64, by node name
        self.public: set[str] = set()  # those of them that need not be hidden
        self.open: set[str] = set()  # sizes, and what depends on them and on public constants
        self.integers: set[str] = set()  # secret ones
        self.indices: dict[str, str] = {}  # those of them that are an input, or one that was moved, and which
        self.nodes: list[Node] = []
        self.missing: dict[str, list[str]] = {}
        self._placeholders(exported, public, axes)
        for node in exported.graph.nodes:
            if node.op == "call_function":
                self._visit(node)
        if self.missing:
            missing = {op: sorted(set(at)) for op, at in sorted(self.missing.items())}
            places = "; ".join(f"{op} at {', '.join(at)}" for op, at in missing.items())
            raise UnsupportedError(f"no protocol for: {places}. Supported: {', '.join(supported())}", missing)
        useless = [v.name for v in self.inputs if not v.frac_bits and not v.limit]
        if useless:
            raise UnsupportedError(f"input {useless[0]!r} has integers, but is no index of an embedding")
        tensors = {name: x for name, x in self.known.items() if isinstance(x, torch.Tensor)}
        self.nodes, self.tensors, self.results = fold_batch_norms(
            self.nodes, tensors, self._outputs(exported), self.codec.frac_bits
        )
        results = [r.name for r in self.results]
        self.nodes = join_linears(pool_before_relu(self.nodes, results), self.tensors)
        self.nodes = fold_gains(self.nodes, self.tensors, results)
        self.nodes, self.weights = lay_out(self.nodes, self.tensors, self.public, self.open, self.codec.frac_bits)

    def _placeholders(self, exported: ExportedProgram, public: Collection[str], axes: Sequence[Axes]) -> None:
        state: Mapping[str, Any] = {**exported.state_dict, **exported.constants}
        unknown = sorted(set(public) - set(state))
        if unknown:
            raise InputError(f"the model has no parameter or buffer named {', '.join(unknown)}, which `public` lists")
        metas = {n.name: n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder"}
        taken: list[tuple[str, torch.Tensor]] = []
        for spec in exported.graph_signature.input_specs:
            if spec.kind == InputKind.USER_INPUT:
                meta = metas[spec.arg.name]
                if isinstance(spec.arg, TensorArgument):
                    taken.append((spec.arg.name, meta))
                elif isinstance(meta, torch.SymInt):
                    raise UnsupportedError(f"input {spec.arg.name!r} is a size: inputs are tensors")
                continue  # any other argument is one that export has made a constant
            tensor = state.get(spec.target or "")
            if not isinstance(tensor, torch.Tensor):
                raise UnsupportedError(f"the model carries an object that is no tensor ({spec.target})")
            floating = tensor.dtype.is_floating_point
            self.known[spec.arg.name] = tensor.detach().to(torch.float64) if floating else tensor.detach()
            transient = spec.kind == InputKind.BUFFER and not spec.persistent
            # integers in the code, not among the weights, say which elements go where, as shapes do
            literal = spec.kind == InputKind.CONSTANT_TENSOR and not floating
            if spec.target in public or transient or literal:
                self.public.add(spec.arg.name)
        self.names = [name for name, _ in taken]
        others, self.caches = without_caches(exported, taken, axes or [{} for _ in taken], self.codec.frac_bits)
        self._inputs(exported, others)

    def _inputs(self, exported: ExportedProgram, taken: Sequence[tuple[str, torch.Tensor, Axes]]) -> None:
        """Declare the inputs and the free sizes that they have, the batch first."""
        found: dict[Any, Size] = {}
        for name, meta, dims in taken:
            for axis, size in enumerate(meta.shape):
                if isinstance(size, torch.SymInt) and size.node.expr not in found:
                    symbol = size.node.expr
                    if not symbol.is_Symbol or symbol not in exported.range_constraints:
                        raise UnsupportedError(f"input {name!r} has a size that depends on another one: {symbol}")
                    found[symbol] = free_size(symbol, exported, dims.get(axis), len(found) + 1)
        symbols = sorted(found, key=lambda symbol: found[symbol].name != BATCH)
        self.sizes = [found[symbol] for symbol in symbols]
        for name, meta, _ in taken:
            shape = tuple(
                -1 - symbols.index(s.node.expr) if isinstance(s, torch.SymInt) else int(s) for s in meta.shape
            )
            if meta.dtype.is_floating_point:
                self.inputs.append(Input(name, shape, self.codec.frac_bits))
            elif meta.dtype in (torch.int64, torch.int32):
                self.inputs.append(Input(name, shape, 0))
                self.integers.add(name)
                self.indices[name] = name
            else:
                raise UnsupportedError(f"input {name!r} has dtype {meta.dtype}: inputs are floating point or indices")

    def _visit(self, node: fx.Node) -> None:
        op, path = operator_name(node.target), _path(node)
        sources = [source.name for source in node.all_input_nodes]
        if all(name in self.known for name in sources):
            self.known[node.name] = constant_value(node, self.known)
            if all(name in self.public for name in sources):
                self.public.add(node.name)
            return
        is_open = public.sizes_only(op) or all(name in self.open or name in self.public for name in sources)
        computed = is_open and isinstance(_made(node), torch.Tensor)
        if op != BATCH_NORM and (not public.computes(op) if computed else lookup(op) is None):
            why = " of public numbers (make a table of them before, and index it by position)" if computed else ""
            self.missing.setdefault(f"{op}{why}", []).append(path)
            return
        if is_open:
            self.open.add(node.name)
        else:
            self._check_dtype(node, op, path)
        masks = computed or op in _MASKS
        args = tuple(_argument(a, op, path, masks) for a in node.args)
        kwargs = {k: _argument(v, op, path, masks) for k, v in node.kwargs.items()}
        kwargs = {k: v for k, v in kwargs.items() if v is not None}
        if computed:
            kwargs.pop("pin_memory", None)
            kwargs["dtype"] = _kind(_made(node).dtype)
        if op == BATCH_NORM and isinstance(node.args[0], fx.Node):
            kwargs["rank"] = node.args[0].meta["val"].dim()
        if op in _SOFTMAX and args[1] in (-1, node.meta["val"].dim() - 1):
            op, args, kwargs = "mpc.softmax", args[:1], {}
        if op.startswith("aten.where.") and not computed:
            kwargs["frac_bits"] = 0 if node.name in self.integers else self.codec.frac_bits
        if node.name in {cache.result for cache in self.caches}:
            op, args, kwargs = "mpc.append", tuple(args[0]), {}
        if op in _CASTS and not is_open and sources[0] in self.integers and node.name not in self.integers:
            op, args, kwargs = "mpc.number", (args[0], self.codec.frac_bits), {}
        self.nodes.append(Node(node.name, op, args, kwargs, path))

    def _check_dtype(self, node: fx.Node, op: str, path: str) -> None:
        """Secret integers come from indices and comparisons, and are given only to operators that take them."""
        integers = [source.name for source in node.all_input_nodes if source.name in self.integers]
        if integers and not takes_integers(op):
            raise UnsupportedError(f"{op} at {path}: takes no secret integers or truth values")
        truths = [source for source in node.all_input_nodes if _is_truth(source)]
        if (_LOGIC.match(op) or (op in _CASTS and _is_truth(node))) and len(truths) < len(node.all_input_nodes):
            raise UnsupportedError(f"{op} at {path}: truth values of numbers; compare them with 0")
        # parameters are encoded as numbers, which may be multiplied, but choose nothing
        if takes_integers(op) and any(t.name in self.known and t.name not in self.public for t in truths):
            raise UnsupportedError(f"{op} at {path}: truth values of parameters, which `public` should name then")
        meta = node.meta.get("val")
        made = [m for m in (meta if isinstance(meta, list | tuple) else [meta]) if isinstance(m, torch.Tensor)]
        if made and not any(m.dtype.is_floating_point for m in made):
            if not (yields_integers(op) or op == _ITEM or (integers and takes_integers(op))):
                raise UnsupportedError(
                    f"{op} at {path}: yields {made[0].dtype}; secrets are floating point (a persistent buffer of "
                    "positions is no secret if `public` names it)"
                )
            self.integers.add(node.name)
        if moves(op) and integers and integers[0] in self.indices:
            self.indices[node.name] = self.indices[integers[0]]
        if op == EMBEDDING and integers and integers[0] in self.indices:
            self._limit(self.indices[integers[0]], int(node.all_input_nodes[0].meta["val"].shape[0]))

    def _limit(self, name: str, rows: int) -> None:
        """An input is the index of a table of so many rows."""
        at = next(i for i, v in enumerate(self.inputs) if v.name == name)
        before = self.inputs[at].limit
        self.inputs[at] = replace(self.inputs[at], limit=min(before or math.inf, float(rows)))

    def _outputs(self, exported: ExportedProgram) -> tuple[Ref, ...]:
        results: list[Ref] = []
        values = exported.graph.output_node().args[0]
        assert isinstance(values, list | tuple)
        for spec, value in zip(exported.graph_signature.output_specs, values, strict=True):
            if spec.kind == OutputKind.USER_INPUT_MUTATION or value is None:
                continue  # nobody sees the tensor that the model overwrites
            if spec.kind != OutputKind.USER_OUTPUT:
                raise UnsupportedError(f"the model changes {spec.target!r} while it runs: a deployed model is constant")
            tensor = isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)
            if not isinstance(value, fx.Node) or value.name in self.known or (tensor and value.name in self.open):
                raise UnsupportedError(f"output {len(results)} of the model does not depend on its inputs")
            if not tensor:
                raise UnsupportedError(f"output {len(results)} of the model is a size, not a tensor")
            if value.name not in {cache.result for cache in self.caches}:
                results.append(Ref(value.name))
        if not results:
            raise UnsupportedError("the model has no output")
        return tuple(results)

    def program(self, reveal: str, k: int) -> Program:
        """The translation, traced once, with what `reveal` adds to it."""
        if self.caches and reveal not in ("logits", "tokens"):
            raise InputError(f"a language model reveals tokens, or logits, not {reveal}")
        if reveal == "tokens" and not self.caches:
            raise InputError("only a model with caches, which takes a text step by step, reveals tokens")
        if reveal not in ("logits", "tokens"):
            if len(self.results) != 1:
                raise InputError(f"reveal={reveal!r} needs a model with one output; this one has {len(self.results)}")
            if self.results[0].name in self.integers:
                raise InputError(f"reveal={reveal!r} needs a model that returns logits; this one returns indices")
            op, *args = {"argmax": ("mpc.argmax",), "top-k": ("mpc.top_k", k), "probabilities": ("mpc.softmax",)}[
                reveal
            ]
            logits = self._logits(self.results[0])
            self.nodes.append(Node("mpc.reveal", str(op), (logits, *args), {}, f"reveal={reveal}"))
            self.results = (Ref("mpc.reveal"),)
            if reveal != "probabilities":
                self.integers.add("mpc.reveal")
        used = {r for node in self.nodes for r in node.references}
        draft = Program(
            frac_bits=self.codec.frac_bits,
            inputs=tuple(self.inputs),
            parameters=tuple(
                Parameter(name, tuple(t.shape), self.codec.frac_bits, name in self.weights)
                for name, t in self.tensors.items()
                if name in used and name not in self.public
            ),
            constants=tuple(self._constant(name) for name in self.tensors if name in used and name in self.public),
            nodes=tuple(self.nodes),
            results=self.results,
            outputs=tuple(Value(r.name, (), self._frac_bits(r.name)) for r in self.results),
            reveal=reveal,
            sizes=tuple(self.sizes),
            caches=tuple(self.caches),
        )
        draft.check()
        return with_output_shapes(draft)

    def _logits(self, result: Ref) -> Ref:
        """The argument of a softmax that ends the model, which then goes: `reveal` applies its own or needs none, and
        small probabilities, unlike logits, round to ties."""
        last = next((node for node in self.nodes if node.name == result.name), None)
        if last is None or last.op != "mpc.softmax" or any(result.name in node.references for node in self.nodes):
            return result
        self.nodes.remove(last)
        logits: Ref = last.args[0]
        return logits

    def _frac_bits(self, name: str) -> int:
        return 0 if name in self.integers else self.codec.frac_bits

    def _constant(self, name: str) -> Constant:
        tensor = self.tensors[name]
        value = public.encoded(tensor, None, self.codec.frac_bits)
        data = tuple(value.value.flatten().to(torch.int64).tolist())
        return Constant(name, tuple(tensor.shape), value.frac_bits, data, tensor.dtype == torch.bool)

    def encoded(self, program: Program) -> dict[str, torch.Tensor]:
        """The program's parameters in fixed point. What they were made of goes, so that a large model is here once."""
        self.known.clear()
        self.tensors = {p.name: self.tensors[p.name] for p in program.parameters}
        return {
            p.name: self.codec.encode(self.tensors.pop(p.name), f"parameter {p.name}").contiguous()
            for p in program.parameters
        }


def _made(node: fx.Node) -> Any:
    """What a node yields, or the first of several results."""
    meta = node.meta.get("val")
    return meta[0] if isinstance(meta, list | tuple) and meta else meta


def _is_truth(node: fx.Node) -> bool:
    return getattr(_made(node), "dtype", None) == torch.bool


def _kind(dtype: torch.dtype) -> str:
    """What public.evaluate calls a dtype."""
    return "bool" if dtype == torch.bool else "float64" if dtype.is_floating_point else "int64"


def _argument(x: Any, op: str, path: str, masks: bool) -> Any:
    """As plain data. `masks`: what is far below zero, down to minus infinity, means "masked"."""
    if isinstance(x, fx.Node):
        return Ref(x.name)
    if isinstance(x, list | tuple):
        return [_argument(item, op, path, masks) for item in x]
    if masks and isinstance(x, float) and x <= public.MASKED_FROM:
        return public.MASKED
    if isinstance(x, torch.dtype | torch.device | torch.layout | torch.memory_format):
        return None  # meaningless for shares
    if not (x is None or isinstance(x, bool | int | float | str)):
        raise UnsupportedError(f"{op} at {path}: an argument is a {type(x).__name__}")
    if isinstance(x, float) and not math.isfinite(x):
        raise UnsupportedError(f"{op} at {path}: an argument is not a finite number")
    return x


def _path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    places = [str(entry[0]) for entry in reversed(list(stack.values()))]
    path = next((place for place in places if place and not place.startswith(_NO_MODULE)), "")
    return path.removeprefix("L['self'].") or node.name
