"""A checkpoint's tensors into a Decoder, whatever the file format calls them and however it lays them out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import nn

from mpcinfer.errors import InputError
from mpcinfer.models.checkpoint import Tensors
from mpcinfer.models.decoder import Decoder, DecoderConfig

DEFAULT_CONTEXT = 2048  # positions, where nobody says how many; each costs memory at every party


@dataclass(frozen=True)
class Layout:
    """How a format spells the tensors of a Decoder.

    names: its modules in the checkpoint, `{}` for a layer's number. prefixes: what names may begin with. fused: a
    module that holds the projections q, k, v side by side, which are then called fused.q and so on. transposed: its
    linear layers are [in, out]. interleaved: rotary embeddings turn neighbouring dimensions rather than dimensions of
    the two halves. gain: what is to be added to the gains of norms. unused: beginnings of names of tensors that are no
    parameters of a decoder, buffers: endings of such names.
    """

    names: Mapping[str, str]
    prefixes: tuple[str, ...] = ()
    fused: str = ""
    transposed: bool = False
    interleaved: bool = False
    gain: float = 0.0
    unused: tuple[str, ...] = ()
    buffers: tuple[str, ...] = ()

    def name(self, ours: str) -> str:
        """What the checkpoint calls the tensor that is `ours` in the module's state."""
        module, _, role = ours.rpartition(".")
        layer = "".join(re.findall(r"\d+", module))
        return f"{self.names[re.sub(r'[0-9]+', '{}', module)]}.{role}".format(layer)


def chosen_context(asked: int | None, longest: int) -> int:
    """How many positions are built; InputError for more than the model has."""
    if asked is None:
        return min(longest, DEFAULT_CONTEXT)
    if not 1 <= asked <= longest:
        raise InputError(f"a context of {asked} tokens: this model takes 1 to {longest}")
    return asked


def filled(sizes: DecoderConfig, tensors: Mapping[str, torch.Tensor], layout: Layout, settings: str) -> Decoder:
    """A Decoder in eval mode with all of a checkpoint's tensors.

    Which biases and norms of heads there are is seen in the first layer, and demanded of all. settings: what the sizes
    were read from, for messages. Raises InputError for tensors that are missing or have other shapes, UnsupportedError
    for some that a decoder has no use for.
    """
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith(layout.buffers or ("\0",))}
    known = Tensors(_split(kept, layout), layout.prefixes, settings)

    def has(name: str) -> bool:
        return re.sub(r"\d+", "{}", name.rpartition(".")[0]) in layout.names and layout.name(name) in known

    config = replace(
        sizes,
        qkv_bias=has("blocks.0.attention.q.bias"),
        out_bias=has("blocks.0.attention.out.bias"),
        mlp_bias=has("blocks.0.mlp.up.bias"),
        head_norm=has("blocks.0.attention.q_norm.weight"),
    )
    with torch.device("meta"):
        model = Decoder(config)
    state = {name: _parameter(model, name, known, layout) for name in model.state_dict()}
    # a checkpoint may repeat the table that is the head as well
    known.check((*layout.unused, *([layout.names["head"]] if config.tied else [])))
    model.load_state_dict(state, assign=True)
    return model.eval().requires_grad_(False)


def _split(tensors: Mapping[str, torch.Tensor], layout: Layout) -> dict[str, torch.Tensor]:
    """With q, k and v apart; biases have one axis, weights have theirs last if they are transposed."""
    if not layout.fused:
        return dict(tensors)
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        before, fused, role = name.partition(f".{layout.fused}.")
        if fused and tensor.dim():
            parts = tensor.chunk(3, -1 if layout.transposed else 0)
            found |= {f"{before}{fused}{q}.{role}": part for q, part in zip("qkv", parts, strict=False)}
        else:
            found[name] = tensor
    return found


def _parameter(model: Decoder, name: str, tensors: Tensors, layout: Layout) -> torch.Tensor:
    """The tensor for a place in the module's state."""
    theirs, shape = layout.name(name), tuple(model.get_parameter(name).shape)
    owner, _, role = name.rpartition(".")
    module = model.get_submodule(owner)
    if owner == "positions":  # the checkpoint may have more than the context takes
        return tensors.take(theirs, (max(tensors.rows(theirs), shape[0]), shape[1]))[: shape[0]].clone()
    turned = layout.transposed and role == "weight" and owner != "head" and isinstance(module, nn.Linear)
    tensor = tensors.take(theirs, shape[::-1] if turned else shape)
    if turned:
        tensor = tensor.t()
    if layout.interleaved and owner.endswith((".attention.q", ".attention.k")):
        pairs = tensor.reshape(-1, model.config.head_dim // 2, 2, *tensor.shape[1:])
        tensor = pairs.transpose(1, 2).reshape(tensor.shape)
    if layout.gain and role == "weight" and isinstance(module, nn.RMSNorm):
        tensor = tensor + layout.gain
    return tensor.contiguous()
