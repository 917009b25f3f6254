"""What is computed on plain weights at deploy: constants, and batch norms folded into the layer before them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from mpcinfer.errors import UnsupportedError
from mpcinfer.graph.program import Node, Ref

# the functional form, which returns a tuple; its training twin has no protocol
BATCH_NORM = "aten._native_batch_norm_legit_no_training.default"
_LAYERS = (
    "aten.conv1d.default",
    "aten.conv1d.padding",
    "aten.conv2d.default",
    "aten.conv2d.padding",
    "aten.linear.default",
)
Tensors = dict[str, torch.Tensor]


def constant_value(node: fx.Node, known: Mapping[str, Any]) -> Any:
    """What a node of an exported graph yields whose operands are all `known`: a tensor or a list of tensors."""
    target = node.target
    assert callable(target)
    if isinstance(target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in target.tags:
        raise UnsupportedError(f"{target}: a model that draws random numbers")
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda operand: known[operand.name])
    try:
        value = target(*args, **kwargs)
    except (RuntimeError, TypeError, ValueError, IndexError) as error:
        raise UnsupportedError(f"{target} of constants ({node.name}) cannot be computed before deploying") from error
    if isinstance(value, list | tuple):
        return [_double(part) for part in value]
    return _double(value)


def _double(x: Any) -> torch.Tensor:
    if not isinstance(x, torch.Tensor):
        raise UnsupportedError(f"a constant of the model is a {type(x).__name__}, not a tensor")
    return x.to(torch.float64) if x.dtype.is_floating_point else x


def fold_batch_norms(
    nodes: list[Node], tensors: Tensors, results: tuple[Ref, ...], frac_bits: int
) -> tuple[list[Node], Tensors, tuple[Ref, ...]]:
    """Replace every batch norm by new weights of the layer before it, or by one multiply-add where there is none.

    `tensors` are the plain parameters by name. Returns new nodes, tensors and results.
    """
    tensors = dict(tensors)
    uses = Counter(r for node in nodes for r in node.references)
    uses.update(r.name for r in results)
    by_name = {node.name: i for i, node in enumerate(nodes)}
    out: list[Node | None] = list(nodes)
    renamed: dict[str, str] = {}
    before: dict[int, list[Node]] = {}
    for i, node in enumerate(nodes):
        if node.op != BATCH_NORM:
            continue
        gain, shift = _affine(node, tensors)
        source = node.args[0]
        layer_at = by_name.get(source.name) if isinstance(source, Ref) else None
        layer = out[layer_at] if layer_at is not None else None
        if layer is not None and layer_at is not None and uses[layer.name] == 1 and _takes(layer, _dims(node), tensors):
            out[layer_at] = _into(layer, gain, shift, tensors)
            out[i] = None
            renamed[node.name] = layer.name
        else:
            column = [-1, *([1] * max(0, _dims(node) - 2))]
            source, mean, deviation = node.args[0], tensors[node.args[3].name], _deviation(node, tensors)
            if imprecise(1 / deviation, frac_bits).any():  # of raw numbers: they are centred, and divided, before
                tensors[f"{node.name}.mean"], tensors[f"{node.name}.deviation"] = (
                    t.reshape(column) for t in (mean, deviation)
                )
                for op, operand in (("sub", "mean"), ("div", "deviation")):
                    pair = (source, Ref(f"{node.name}.{operand}"))
                    before.setdefault(i, []).append(Node(f"{node.name}_{op}", f"aten.{op}.Tensor", pair, {}, node.path))
                    source = Ref(f"{node.name}_{op}")
                gain, shift = gain * deviation, shift + mean * gain
            tensors[f"{node.name}.gain"] = gain.reshape(column)
            tensors[f"{node.name}.shift"] = shift.reshape(column)
            args = (source, Ref(f"{node.name}.gain"), Ref(f"{node.name}.shift"))
            out[i] = Node(node.name, "mpc.affine", args, {}, node.path)
    whole = [each for i, node in enumerate(out) for each in (*before.get(i, ()), node)]
    kept = _without_getitems(whole, {n.name for n in nodes if n.op == BATCH_NORM}, renamed)
    return kept, tensors, _renamed(results, renamed)


def imprecise(factor: torch.Tensor, frac_bits: int) -> torch.Tensor:
    """Which numbers so many fraction bits hold with an error of more than 2^-12 of them: bool, of the same shape.

    Where there are few bits, of more than any number from 1/2 on has.
    """
    unit = 2.0**frac_bits
    return ((factor * unit).round() / unit - factor).abs() > 2.0 ** -min(12, frac_bits - 1) * factor.abs()


def _deviation(node: Node, tensors: Tensors) -> torch.Tensor:
    return torch.sqrt(tensors[node.args[4].name] + float(node.args[-1]))


def _dims(node: Node) -> int:
    """Rank of the normalised tensor, recorded by capture."""
    return int(node.kwargs["rank"])


def _affine(node: Node, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    """The gain and shift that a batch norm is in evaluation mode."""
    args = list(node.args)
    unknown = [a for a in args[1:5] if isinstance(a, Ref) and a.name not in tensors]
    if unknown:
        raise UnsupportedError(f"batch norm at {node.path} with statistics or gains that depend on the input")
    weight, bias, mean, variance = (tensors[a.name] if isinstance(a, Ref) else None for a in args[1:5])
    if mean is None or variance is None:
        raise UnsupportedError(f"batch norm without running statistics at {node.path}")
    gain = (torch.ones_like(mean) if weight is None else weight) / _deviation(node, tensors)
    return gain, (torch.zeros_like(mean) if bias is None else bias) - mean * gain


def _takes(layer: Node, rank: int, tensors: Tensors) -> bool:
    """Whether the channels of a batch norm on a tensor of this rank are the layer's outputs, and its weights known."""
    if layer.op not in _LAYERS:
        return False
    parameters = [a for a in layer.args[1:3] if isinstance(a, Ref)]
    # after a linear layer on [N, C, in] the batch norm's channels are C, not the outputs
    return all(a.name in tensors for a in parameters) and tensors[parameters[0].name].dim() == rank


def _into(layer: Node, gain: torch.Tensor, shift: torch.Tensor, tensors: Tensors) -> Node:
    args: list[Any] = list(layer.args)
    weight = tensors[args[1].name]
    bias = tensors[args[2].name] if len(args) > 2 and isinstance(args[2], Ref) else torch.zeros_like(gain)
    names = f"{layer.name}.folded", f"{layer.name}.folded_bias"
    tensors[names[0]] = weight * gain.reshape(-1, *([1] * (weight.dim() - 1)))
    tensors[names[1]] = bias * gain + shift
    args[1:3] = [Ref(names[0]), Ref(names[1])]
    return replace(layer, args=tuple(args))


def _without_getitems(nodes: list[Node | None], norms: set[str], renamed: dict[str, str]) -> list[Node]:
    """The functional batch norm returns a tuple, of which only the first member means anything here."""
    kept = []
    for node in nodes:
        if node is None:
            continue
        if node.op == "_operator.getitem" and isinstance(node.args[0], Ref) and node.args[0].name in norms:
            source = node.args[0].name
            renamed[node.name] = renamed.get(source, source)
            continue
        kept.append(replace(node, args=_renamed(node.args, renamed), kwargs=_renamed(node.kwargs, renamed)))
    return kept


def _renamed(x: Any, names: dict[str, str]) -> Any:
    if isinstance(x, Ref):
        return Ref(names.get(x.name, x.name))
    if isinstance(x, tuple):
        return tuple(_renamed(item, names) for item in x)
    if isinstance(x, list):
        return [_renamed(item, names) for item in x]
    return {k: _renamed(v, names) for k, v in x.items()} if isinstance(x, dict) else x
