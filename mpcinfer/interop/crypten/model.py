"""Models of crypten.nn as torch modules that deploy: their modules become a graph of operators, as ONNX files do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

import numpy as np
import torch
from torch import nn

from mpcinfer.errors import InputError, UnsupportedError
from mpcinfer.interop.crypten import shim
from mpcinfer.interop.crypten.leaves import LEAVES, Leaf
from mpcinfer.models.onnx.graph import Graph, GraphInput, Node, fold
from mpcinfer.models.onnx.module import OnnxModule
from mpcinfer.models.onnx.patterns import simplify
from mpcinfer.models.onnx.table import lookup

_OPSET = 17  # what CrypTen's converter asks for
_MODULES = ("crypten.nn.module", shim.__name__)
_CONTAINERS = ("ModuleList", "ModuleDict")
_OWN = ("_parameters", "_buffers", "_modules", "training", "encrypted")

Numbers = Callable[[Any], np.ndarray[Any, Any]]


def from_crypten(module: Any, *, decrypt: bool = False) -> nn.Module:
    """The torch module, in eval mode, that computes what a `crypten.nn` model does: for `ModelOwner.deploy`.

    Takes modules of crypten.nn, Sequential and Graph (also what `crypten.nn.from_pytorch` and `from_onnx` made), and
    classes with a `forward` of their own, whose `forward` then runs on torch tensors. Parameters and buffers are secret
    when deployed, and so are constants that are no single numbers.
    decrypt: an encrypted module is refused unless this is set. Then all its parties have to call this at the same time,
    and each of them learns every weight. Numbers are decoded here: CrypTen's decoder is off by 1 for some below -1.

    Raises UnsupportedError naming every module that has no counterpart with its place, InputError for what is no
    crypten module, for encrypted ones, and for models in training mode (call `eval()` before).
    """
    crypten = shim.install_shim()
    if not isinstance(module, crypten.nn.Module):
        raise InputError(
            f"from_crypten takes a crypten.nn.Module, not {type(module).__name__}; a torch module deploys as it is"
        )
    for name, part in module.named_modules():
        if part.training:
            raise InputError(f"{name or 'the model'} is in training mode: call model.eval() before")
        if part.encrypted and not decrypt and (part._parameters or part._buffers):
            raise InputError(
                f"{name or 'the model'} is encrypted. Convert the model before it is encrypted; or have all its "
                "parties call from_crypten(model, decrypt=True), after which each of them knows the weights"
            )
    return _convert(module, "", lambda x: _plain(x, crypten)).eval()


def _plain(x: Any, crypten: Any) -> np.ndarray[Any, Any]:
    """A parameter's numbers; those of an encrypted one are opened to all of its parties."""
    if crypten.is_encrypted_tensor(x):
        x = x.reveal().double() / x.encoder.scale
    array: np.ndarray[Any, Any] = x.detach().cpu().numpy()
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _forward_of(module: Any) -> type:
    """The class whose `forward` a module has."""
    return next(kind for kind in type(module).__mro__ if "forward" in vars(kind))


def _is_own(module: Any) -> bool:
    """Whether a module computes what a user wrote."""
    return not _forward_of(module).__module__.startswith(("crypten.", shim.__name__))


def _convert(module: Any, place: str, numbers: Numbers) -> nn.Module:
    if type(module).__name__ in _CONTAINERS and type(module).__module__ in _MODULES:
        parts = {name: _convert(part, _join(place, name), numbers) for name, part in module._modules.items()}
        return nn.ModuleList(parts.values()) if type(module).__name__ == "ModuleList" else nn.ModuleDict(parts)
    return _Own(module, place, numbers) if _is_own(module) else _Translator(numbers).model(module, place)


def _join(place: str, name: str) -> str:
    return f"{place}.{name}" if place else name


class _Own(nn.Module):
    """A class with a `forward` of its own: that runs as it is, on what its parts have become."""

    def __init__(self, source: Any, place: str, numbers: Numbers) -> None:
        super().__init__()
        self._type, self._place = type(source), place or "the model"
        for name, part in source._modules.items():
            self.add_module(name, _convert(part, _join(place, name), numbers))
        for name, x in source._parameters.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(numbers(x)), requires_grad=False))
        for name, x in source._buffers.items():
            self.register_buffer(name, torch.tensor(numbers(x)))
        taken = {*_OWN, *source._modules, *source._parameters, *source._buffers}
        for name, x in vars(source).items():
            if name not in taken:
                setattr(self, name, x)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            kind = self.__dict__.get("_type")
            if kind is None or not hasattr(kind, name):
                raise
            return inspect.getattr_static(kind, name).__get__(self, type(self))  # a method, or a property

    def forward(self, *inputs: Any) -> Any:
        try:
            return self._type.forward(self, *inputs)
        except (AttributeError, TypeError) as error:
            raise UnsupportedError(
                f"{self._type.__name__} at {self._place}: its forward does not run on torch tensors ({error})"
            ) from error


class _Translator:
    """Turns modules that CrypTen defines into one graph."""

    def __init__(self, numbers: Numbers) -> None:
        self._numbers = numbers
        self._nodes: list[Node] = []
        self._known: dict[str, np.ndarray[Any, Any]] = {}
        self._missing: dict[str, list[str]] = {}

    def model(self, module: Any, place: str) -> nn.Module:
        """The torch module of a whole model, or of a part of one at `place`."""
        names = list(module.input_names) if _forward_of(module).__name__ == "Graph" else ["input"]
        outputs = self._translate(module, [f"input:{name}" for name in names], place)
        if self._missing:
            found = "; ".join(f"{what} at {', '.join(places)}" for what, places in sorted(self._missing.items()))
            raise UnsupportedError(f"the model has modules that have no counterpart: {found}", self._missing)
        self._restore_sizes()
        graph = Graph(
            producer="crypten",
            opset=_OPSET,
            inputs=tuple(GraphInput(f"input:{name}", "float", ()) for name in names),
            outputs=tuple(outputs),
            nodes=self._nodes,
            known=self._known,
            secret={name for name, x in self._known.items() if x.ndim and x.dtype.kind == "f"},
            dtypes={},
            ranks={name: x.ndim for name, x in self._known.items()},
        )
        fold(graph)
        simplify(graph)
        return OnnxModule(graph)

    def _translate(self, module: Any, operands: Sequence[str], place: str) -> list[str]:
        """Append what a module does with values; the names of its results."""
        kind = _forward_of(module)
        name = kind.__name__ if kind.__module__ in _MODULES else ""
        if name == "Graph":
            return self._graph(module, operands, place)
        if name == "Parameter":
            return [self._hold(place, module.data)]
        if name == "Constant":
            return [self._hold(place, module.value)]
        try:
            if name not in LEAVES:
                raise UnsupportedError(
                    "a forward of its own, inside of a Graph or Sequential" if _is_own(module) else ""
                )
            leaf = LEAVES[name](module)
            if len(getattr(module, "_output_names", None) or [""]) > 1:
                raise UnsupportedError("several results")
            own = [self._hold(_join(place, p), getattr(module, p)) for p in leaf.parameters]
            self._nodes.append(_node(leaf, place or name, (*operands, *own), f"{place}:result"))
        except UnsupportedError as error:
            what = f"{type(module).__name__} ({error})" if str(error) else type(module).__name__
            self._missing.setdefault(what, []).append(place or "the model")
        return [f"{place}:result"]

    def _graph(self, graph: Any, operands: Sequence[str], place: str) -> list[str]:
        values = dict(zip(graph.input_names, operands, strict=True))
        # a Sequential of an OrderedDict has a bare name where there should be a list of one
        sources: Mapping[str, Sequence[str]] = {
            name: [names] if isinstance(names, str) else names for name, names in graph._graph.items()
        }
        try:
            order = [name for name in TopologicalSorter(sources).static_order() if name not in values]
            for name in order:
                made = self._translate(graph._modules[name], [values[n] for n in sources[name]], _join(place, name))
                values[name] = made[0]
            return [values[name] for name in graph.output_names]
        except (KeyError, CycleError) as error:
            raise InputError(f"the graph at {place or 'the model'} is not connected ({error})") from error

    def _hold(self, name: str, x: Any) -> str:
        self._known[name] = self._numbers(x)
        return name

    def _restore_sizes(self) -> None:
        """CrypTen makes numbers of all constants; those that sizes and indices are made of become integers again."""
        wanted: set[str] = set()
        for node in reversed(self._nodes):
            operator = lookup(node.op, _OPSET)
            if wanted.intersection(node.outputs) and node.op != "Shape":
                wanted.update(node.inputs)
            elif operator is not None and node.op not in ("Pow", "Clip"):
                wanted.update(node.inputs[i] for i in operator.public if i < len(node.inputs))
            elif node.op == "ConstantOfShape":
                wanted.update(node.inputs)
        for name in wanted.intersection(self._known):
            self._known[name] = np.rint(self._known[name]).astype(np.int64)


def _node(leaf: Leaf, name: str, operands: tuple[str, ...], result: str) -> Node:
    """The node of a leaf; operands come before attributes of the same name. UnsupportedError if they do not fit."""
    operator, attributes = lookup(leaf.op, _OPSET), leaf.attributes
    if operator is not None:
        signature = inspect.signature(operator.function)
        try:
            given = signature.bind_partial(*operands).arguments
            attributes = {key: x for key, x in attributes.items() if key not in given}
            signature.bind(*operands, **attributes)
        except TypeError as error:
            raise UnsupportedError(str(error)) from error
    return Node(leaf.op, name, operands, (result,), attributes)
