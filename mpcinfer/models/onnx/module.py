"""An ONNX graph as a torch module, made of ordinary torch operators, one submodule for each node.

What depends on shapes alone is computed in Python while the module is traced, and leaves no operator behind.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from mpcinfer.errors import InputError, UnsupportedError
from mpcinfer.models.onnx.graph import Graph, Node, derived, of_shapes
from mpcinfer.models.onnx.table import Operator, lookup

# beyond what any model computes: the "minus infinity" of masks, and what stands for it, which a softmax makes 0 as well
_INFINITE, _MASKED = 1e30, 2.0**15


def identifier(name: str) -> str:
    """A name of the file as one of Python, the way `--inputs` writes it."""
    return re.sub(r"\W", "_", name)


class Step(nn.Module):
    """One node. Its operands are tensors, known arrays, or None where one is left out."""

    def __init__(self, node: Node, operator: Operator) -> None:
        super().__init__()
        self.node = node
        self.operator = operator

    def forward(self, *operands: Any) -> Any:
        operator = self.operator
        values = [x if i in operator.public else _tensor(x, operator.numbers) for i, x in enumerate(operands)]
        try:
            return operator.function(*values, **self.node.attributes)
        except UnsupportedError as error:
            raise UnsupportedError(f"{self.node.op} at {self.node.name}: {error}") from error
        except (RuntimeError, ValueError, IndexError, TypeError) as error:
            raise InputError(f"{self.node.op} at {self.node.name}: its operands do not fit ({error})") from error


def _tensor(x: Any, numbers: bool) -> Any:
    if not isinstance(x, np.ndarray):
        return x
    if x.ndim == 0 or (numbers and x.size == 1 and x.ndim == 1):
        return x.reshape(()).item()
    return torch.tensor(_finite(x).astype(np.float32) if x.dtype == np.object_ else _finite(x))


def _finite(x: Any) -> Any:
    return np.where(np.abs(x) < _INFINITE, x, np.sign(x) * _MASKED).astype(x.dtype) if x.dtype.kind == "f" else x


class OnnxModule(nn.Module):
    """The graph: one positional argument for each input, and a tuple of results unless there is but one."""

    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.opset = graph.opset
        self.inputs = [i.name for i in graph.inputs]
        self.integers = {i.name for i in graph.inputs if i.dtype == "int"}
        self.outputs = graph.outputs
        self.derived = derived(graph)
        self.tensors: dict[str, str] = {}  # names of parameters and buffers, by the file's
        self.known = graph.known
        self.steps = nn.ModuleList()
        self.nodes: list[Node | Step] = []
        for node in graph.nodes:
            if self.derived.intersection(node.outputs):
                self.nodes.append(node)
                continue
            operator = lookup(node.op, graph.opset)
            assert operator is not None
            step = Step(node, operator)
            self.add_module(self._free_name(node.name), step)
            self.nodes.append(step)
            for i, name in enumerate(node.inputs):
                if i not in operator.public and name in graph.known:
                    self._hold(name, graph, operator.numbers)

    def _free_name(self, name: str) -> str:
        base = name.strip("/").replace(".", "_") or "node"
        while hasattr(self, base):
            base += "_"
        return base

    def _hold(self, name: str, graph: Graph, numbers: bool) -> None:
        """Register an operand: parameters are secret, buffers that are not persistent public."""
        value = graph.known[name]
        if name in self.tensors or (name not in graph.secret and not isinstance(_tensor(value, numbers), torch.Tensor)):
            return
        own = self._free_name(identifier(name))
        self.tensors[name] = own
        tensor = torch.tensor(_finite(value))
        if name in graph.secret:
            self.register_parameter(own, nn.Parameter(tensor, requires_grad=False))
        else:
            self.register_buffer(own, tensor, persistent=False)

    def forward(self, *inputs: torch.Tensor) -> Any:
        values: dict[str, Any] = {"": None, **self.known}
        held = {name: getattr(self, own) for name, own in self.tensors.items()}
        values.update(zip(self.inputs, inputs, strict=True))
        for item in self.nodes:
            node = item.node if isinstance(item, Step) else item
            if isinstance(item, Step):
                public = item.operator.public
                operands = [values[n] if i in public else held.get(n, values[n]) for i, n in enumerate(node.inputs)]
                results = item(*operands)
            else:
                results = self._of_shapes(node, [values[n] for n in node.inputs])
            results = results if isinstance(results, list | tuple) else [results]
            values.update(zip(node.outputs, results, strict=False))
        outputs = tuple(held.get(name, values[name]) for name in self.outputs)
        return outputs[0] if len(outputs) == 1 else outputs

    def _of_shapes(self, node: Node, operands: Sequence[Any]) -> Sequence[Any]:
        try:
            return of_shapes(node, operands, self.opset)
        except UnsupportedError as error:
            raise UnsupportedError(f"{node.op} at {node.name}: {error}") from error
