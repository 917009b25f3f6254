"""From a torch module to a Program and its weights, by torch.export, on the model owner's machine."""

from __future__ import annotations

import inspect
import math
import operator
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.export import Dim, ExportedProgram, export
from torch.export.graph_signature import InputKind, OutputKind, TensorArgument
from torch.utils._pytree import tree_leaves

from mpcinfer.errors import InputError, UnsupportedError
from mpcinfer.graph.bounds import with_limits
from mpcinfer.graph.fold import BATCH_NORM, constant_value, fold_batch_norms
from mpcinfer.graph.plan import plan_inference
from mpcinfer.graph.program import REVEALS, Constant, Input, Node, Parameter, Program, Ref, Value, references
from mpcinfer.graph.reorder import pool_before_relu
from mpcinfer.nn import lookup, supported
from mpcinfer.nn.shape import moves
from mpcinfer.ring.codec import FixedPoint

# position of the operand that may be a fixed weight
_WEIGHT_AT = {
    "mpc.linear": 1,
    "mpc.affine": 1,
    "aten.conv1d.default": 1,
    "aten.conv1d.padding": 1,
    "aten.conv2d.default": 1,
    "aten.conv2d.padding": 1,
    "aten.matmul.default": 1,
    "aten.mm.default": 1,
    "aten.mul.Tensor": 1,
}
# operators that take a public tensor as it is; any other gets it as one more secret
_TAKES_PUBLIC = ("aten.add.Tensor", "aten.sub.Tensor", "aten.rsub.Tensor", "aten.mul.Tensor")
# what argmax yields is an integer, and may only be moved
_INTEGERS = ("aten.argmax.default",)
_ITEM = "_operator.getitem"
# over the last axis these are mpc.softmax, which `reveal` recognises
_SOFTMAX = ("aten.softmax.int", "aten._softmax.default")
# checks of sizes and dtypes that export adds; they compute nothing
_CHECKS = ("aten._assert_tensor_metadata.default", "aten._assert_scalar.default")


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
) -> Captured:
    """Export `model` (in eval mode) and translate it.

    example_inputs: one tensor per argument, real ones if possible: from their range the inputs' limits are made
    (`graph.bounds`). If all share their first size it becomes a free batch size where the model allows it. An
    ExportedProgram has its own, unless others are given. reveal: "logits", "probabilities", "top-k" (with `k`) or
    "argmax". Parameters and persistent buffers are secret; non-persistent buffers and those named in `public` (as in
    `state_dict`) are public. What depends on no input is computed here; outputs that are None are left out.
    Raises InputError for a model in training mode, UnsupportedError naming every operator that has no protocol with
    its module path, RangeError for parameters that can't be encoded and for inputs that the model makes too large.
    """
    if reveal not in REVEALS:
        raise InputError(f"reveal must be one of {', '.join(REVEALS)}, not {reveal!r}")
    codec = FixedPoint(frac_bits)
    translated = _Translator(_export(model, example_inputs), codec, public)
    program = translated.program(reveal, k)
    weights = translated.encoded(program)
    return Captured(with_limits(program, weights, _examples(model, example_inputs)), weights)


def _examples(model: nn.Module | ExportedProgram, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """One tensor for each of the program's inputs."""
    if isinstance(model, ExportedProgram) and not inputs:
        return [x for x in tree_leaves(model.example_inputs) if isinstance(x, torch.Tensor)]
    return list(inputs)


def _export(model: nn.Module | ExportedProgram, inputs: Sequence[torch.Tensor]) -> ExportedProgram:
    """The exported model without in-place operators; its batch size is free where the model allows it."""
    if isinstance(model, ExportedProgram):
        return _functional(model)
    training = [name or "the model" for name, module in model.named_modules() if module.training]
    if training:
        raise InputError(f"{training[0]} is in training mode: call model.eval() before deploying")
    if isinstance(inputs, torch.Tensor) or not inputs or not all(isinstance(x, torch.Tensor) for x in inputs):
        raise InputError("example_inputs must be a sequence with one tensor per argument of the model")
    with torch.no_grad():
        # export takes two uses of one tensor for one input, hence the copies
        sizes = {x.shape[0] if x.dim() else 0 for x in inputs}
        if len(sizes) == 1 and sizes != {0}:
            # and a size of 1 for a constant
            several = tuple(x.repeat(2, *([1] * (x.dim() - 1))) if x.shape[0] == 1 else x.clone() for x in inputs)
            try:
                return _functional(_quiet_export(model, several, _free_batch(model, several)))
            except Exception:  # of many types, when a model fixes its batch size: the next attempt says what else it is
                pass
        try:
            return _functional(_quiet_export(model, tuple(x.clone() for x in inputs), None))
        except Exception as error:
            cause = next(iter(str(error).splitlines()), "no message")[:300]
            raise UnsupportedError(
                f"torch.export cannot capture this model; does it branch on values? ({type(error).__name__}: {cause})"
            ) from error


def _free_batch(model: nn.Module, inputs: tuple[torch.Tensor, ...]) -> dict[str, Any]:
    """The first size of every input as one free size, by the names of `forward`'s arguments."""
    free = {0: Dim("batch")}
    bound = inspect.signature(model.forward).bind(*inputs).arguments
    return {name: tuple(free for _ in x) if isinstance(x, tuple) else free for name, x in bound.items()}


def _quiet_export(model: nn.Module, inputs: tuple[torch.Tensor, ...], dynamic_shapes: Any) -> ExportedProgram:
    with warnings.catch_warnings():
        # torch 2.13 warns of a class that it uses itself
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        exported: ExportedProgram = export(model, inputs, dynamic_shapes=dynamic_shapes)
        return exported


def _functional(exported: ExportedProgram) -> ExportedProgram:
    """Without in-place operators and code whose results nobody uses; a new object."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r".*isinstance\(treespec, LeafSpec\)", FutureWarning)
        functional: ExportedProgram = exported.run_decompositions({})
    functional.graph.eliminate_dead_code()
    return functional


class _Translator:
    """Walks the exported graph once."""

    def __init__(self, exported: ExportedProgram, codec: FixedPoint, public: Collection[str]) -> None:
        self.codec = codec
        self.inputs: list[Input] = []
        self.known: dict[str, Any] = {}  # parameters and what depends on them alone, in float64, by node name
        self.public: set[str] = set()  # those of them that need not be hidden
        self.integers: set[str] = set()
        self.nodes: list[Node] = []
        self.missing: dict[str, list[str]] = {}
        self._placeholders(exported, public)
        for node in exported.graph.nodes:
            if node.op == "call_function":
                self._visit(node)
        if self.missing:
            places = "; ".join(f"{op} at {', '.join(sorted(set(at)))}" for op, at in sorted(self.missing.items()))
            raise UnsupportedError(f"no protocol for: {places}. Supported: {', '.join(supported())}")
        tensors = {name: x for name, x in self.known.items() if isinstance(x, torch.Tensor)}
        self.nodes, self.tensors, self.results = fold_batch_norms(self.nodes, tensors, self._outputs(exported))
        self.nodes = pool_before_relu(self.nodes, [r.name for r in self.results])
        self.weights: set[str] = set()
        self.nodes = [self._laid_out(node) for node in self.nodes]

    def _placeholders(self, exported: ExportedProgram, public: Collection[str]) -> None:
        state: Mapping[str, Any] = {**exported.state_dict, **exported.constants}
        unknown = sorted(set(public) - set(state))
        if unknown:
            raise InputError(f"the model has no parameter or buffer named {', '.join(unknown)}, which `public` lists")
        metas = {n.name: n.meta.get("val") for n in exported.graph.nodes if n.op == "placeholder"}
        for spec in exported.graph_signature.input_specs:
            if spec.kind == InputKind.USER_INPUT:
                self._input(spec.arg.name, metas[spec.arg.name], isinstance(spec.arg, TensorArgument))
                continue
            tensor = state.get(spec.target or "")
            if not isinstance(tensor, torch.Tensor):
                raise UnsupportedError(f"the model carries an object that is no tensor ({spec.target})")
            floating = tensor.dtype.is_floating_point
            self.known[spec.arg.name] = tensor.detach().to(torch.float64) if floating else tensor.detach()
            if spec.target in public or (spec.kind == InputKind.BUFFER and not spec.persistent):
                self.public.add(spec.arg.name)

    def _input(self, name: str, meta: Any, tensor: bool) -> None:
        if not tensor:
            if isinstance(meta, torch.SymInt):
                raise UnsupportedError(f"input {name!r} is a size: inputs are tensors")
            return  # an argument that export has made a constant
        if not meta.dtype.is_floating_point:
            raise UnsupportedError(f"input {name!r} has dtype {meta.dtype}: inputs are floating point")
        if any(isinstance(s, torch.SymInt) for s in meta.shape[1:]):
            raise UnsupportedError(f"input {name!r} has a free size: only the first, the batch size, may be free")
        shape = tuple(-1 if isinstance(s, torch.SymInt) else int(s) for s in meta.shape)
        self.inputs.append(Input(name, shape, self.codec.frac_bits))

    def _visit(self, node: fx.Node) -> None:
        op, path = _name(node.target), _path(node)
        if op in _CHECKS:
            return
        if all(source.name in self.known for source in node.all_input_nodes):
            self.known[node.name] = constant_value(node, self.known)
            if node.all_input_nodes and all(source.name in self.public for source in node.all_input_nodes):
                self.public.add(node.name)
            return
        if op != BATCH_NORM and lookup(op) is None:
            self.missing.setdefault(op, []).append(path)
            return
        self._check_dtype(node, op, path)
        args = tuple(_argument(a, op, path) for a in node.args)
        kwargs = {k: v for k, v in ((k, _argument(v, op, path)) for k, v in node.kwargs.items()) if v is not None}
        if op == BATCH_NORM and isinstance(node.args[0], fx.Node):
            kwargs["rank"] = node.args[0].meta["val"].dim()
        if op in _SOFTMAX and args[1] in (-1, node.meta["val"].dim() - 1):
            op, args, kwargs = "mpc.softmax", args[:1], {}
        self.nodes.append(Node(node.name, op, args, kwargs, path))

    def _check_dtype(self, node: fx.Node, op: str, path: str) -> None:
        """Integers are refused unless they are indices that argmax found and that are only moved."""
        meta = node.meta.get("val")
        made = [m for m in (meta if isinstance(meta, list | tuple) else [meta]) if isinstance(m, torch.Tensor)]
        from_integers = any(source.name in self.integers for source in node.all_input_nodes)
        if made and not any(m.dtype.is_floating_point for m in made):
            if op not in (*_INTEGERS, _ITEM) and not (from_integers and moves(op)):
                raise UnsupportedError(f"{op} at {path}: yields {made[0].dtype}; secrets are floating point")
            self.integers.add(node.name)
        elif made and from_integers:
            raise UnsupportedError(f"{op} at {path}: indices can be moved and returned, not computed with")

    def _outputs(self, exported: ExportedProgram) -> tuple[Ref, ...]:
        results: list[Ref] = []
        values = exported.graph.output_node().args[0]
        assert isinstance(values, list | tuple)
        for spec, value in zip(exported.graph_signature.output_specs, values, strict=True):
            if spec.kind == OutputKind.USER_INPUT_MUTATION or value is None:
                continue  # nobody sees the tensor that the model overwrites
            if spec.kind != OutputKind.USER_OUTPUT:
                raise UnsupportedError(f"the model changes {spec.target!r} while it runs: a deployed model is constant")
            if not isinstance(value, fx.Node) or value.name in self.known:
                raise UnsupportedError(f"output {len(results)} of the model does not depend on its inputs")
            if not isinstance(value.meta.get("val"), torch.Tensor):
                raise UnsupportedError(f"output {len(results)} of the model is a size, not a tensor")
            results.append(Ref(value.name))
        if not results:
            raise UnsupportedError("the model has no output")
        return tuple(results)

    def _laid_out(self, node: Node) -> Node:
        """The node with one name for each role of a tensor, which may be a weight here and a plain secret there.

        Weights of linear layers are stored [in, out], the way the kernels read them fastest.
        """
        op, args = node.op, list(node.args)
        if op == "aten.linear.default" and self._tensor(args[1]) is not None:
            stored = f"{args[1].name}.T"
            self.tensors[stored] = self.tensors[args[1].name].t()
            op, args[1] = "mpc.linear", Ref(stored)
        if op == "aten.div.Tensor" and (divisor := self._tensor(args[1])) is not None:
            inverse = f"{args[1].name}.inverse"
            self.tensors[inverse] = 1 / divisor
            op, args[1] = "aten.mul.Tensor", Ref(inverse)
        if op == "aten.mul.Tensor" and self._tensor(args[0]) is not None:
            args.reverse()
        for i, argument in enumerate(args):
            tensor = self._tensor(argument)
            if tensor is None or (argument.name in self.public and op in _TAKES_PUBLIC):
                continue
            weight = i == _WEIGHT_AT.get(op)
            if weight or argument.name in self.public:
                args[i] = Ref(f"{argument.name}.{'weight' if weight else 'secret'}")
                self.tensors[args[i].name] = tensor
            if weight:
                self.weights.add(args[i].name)
        return replace(node, op=op, args=tuple(args))

    def _tensor(self, argument: Any) -> torch.Tensor | None:
        return self.tensors.get(argument.name) if isinstance(argument, Ref) else None

    def program(self, reveal: str, k: int) -> Program:
        """The translation, traced once, with what `reveal` adds to it."""
        if reveal != "logits":
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
        used = {r for node in self.nodes for r in references(node)}
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
        )
        draft.check()
        return _with_output_shapes(draft)

    def _logits(self, result: Ref) -> Ref:
        """The argument of a softmax that ends the model, which then goes: `reveal` applies its own or needs none, and
        small probabilities, unlike logits, round to ties."""
        last = next((node for node in self.nodes if node.name == result.name), None)
        if last is None or last.op != "mpc.softmax" or any(result.name in references(node) for node in self.nodes):
            return result
        self.nodes.remove(last)
        logits: Ref = last.args[0]
        return logits

    def _frac_bits(self, name: str) -> int:
        return 0 if name in self.integers else self.codec.frac_bits

    def _constant(self, name: str) -> Constant:
        tensor = self.tensors[name]
        encoded = self.codec.encode(tensor, f"public tensor {name}")
        return Constant(name, tuple(tensor.shape), self.codec.frac_bits, tuple(encoded.flatten().tolist()))

    def encoded(self, program: Program) -> dict[str, torch.Tensor]:
        """The program's parameters in fixed point."""
        return {
            p.name: self.codec.encode(self.tensors[p.name], f"parameter {p.name}").contiguous()
            for p in program.parameters
        }


def _with_output_shapes(draft: Program) -> Program:
    """Trace the program for two batch sizes: refuses here what would fail at run time, and declares the outputs."""
    shapes = []
    for batch in (2, 7):
        inputs = [tuple(batch if s == -1 else s for s in v.shape) for v in draft.inputs]
        shapes.append(plan_inference(draft, inputs, parties=2)[2])
    outputs = tuple(
        replace(value, shape=tuple(x if x == y else -1 for x, y in zip(a, b, strict=True)))
        for value, a, b in zip(draft.outputs, *shapes, strict=True)
    )
    return replace(draft, outputs=outputs)


def _name(target: Any) -> str:
    name = getattr(target, "__name__", "")
    return f"_operator.{name}" if name and getattr(operator, name, None) is target else str(target)


def _argument(x: Any, op: str, path: str) -> Any:
    if isinstance(x, fx.Node):
        return Ref(x.name)
    if isinstance(x, list | tuple):
        return [_argument(item, op, path) for item in x]
    if isinstance(x, torch.dtype | torch.device | torch.layout | torch.memory_format):
        return None  # meaningless for shares
    if not (x is None or isinstance(x, bool | int | float | str)):
        raise UnsupportedError(f"{op} at {path}: an argument is a {type(x).__name__}")
    if isinstance(x, float) and not math.isfinite(x):
        raise UnsupportedError(f"{op} at {path}: an argument is not a finite number")
    return x


def _path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = next((str(entry[0]) for entry in reversed(list(stack.values())) if entry[0]), "")
    return path.removeprefix("L['self'].") or node.name
