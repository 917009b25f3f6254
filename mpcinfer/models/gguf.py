"""A GGUF file, as llama.cpp takes it, to a Decoder: whatever the quantisation, its weights become float32."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy
import torch

from mpcinfer.errors import InputError, UnsupportedError
from mpcinfer.models import rope
from mpcinfer.models.decoder import DecoderConfig, loaded_decoder
from mpcinfer.models.decoder_fill import Layout, chosen_context, filled
from mpcinfer.models.gguf_vocabulary import vocabulary
from mpcinfer.models.loaded import Loaded
from mpcinfer.models.rope import Rope

_NAMES = {
    "embedding": "token_embd",
    "positions": "position_embd",
    "norm": "output_norm",
    "head": "output",
    "blocks.{}.attention_norm": "blk.{}.attn_norm",
    "blocks.{}.attention.q": "blk.{}.attn_q",
    "blocks.{}.attention.k": "blk.{}.attn_k",
    "blocks.{}.attention.v": "blk.{}.attn_v",
    "blocks.{}.attention.out": "blk.{}.attn_output",
    "blocks.{}.attention.q_norm": "blk.{}.attn_q_norm",
    "blocks.{}.attention.k_norm": "blk.{}.attn_k_norm",
    "blocks.{}.norm": "blk.{}.ffn_norm",
    "blocks.{}.mlp.gate": "blk.{}.ffn_gate",
    "blocks.{}.mlp.up": "blk.{}.ffn_up",
    "blocks.{}.mlp.down": "blk.{}.ffn_down",
}
_UNUSED = ("rope_freqs.",)  # which is no parameter, but worked into the tables
_PLAIN = Layout(_NAMES, unused=_UNUSED)
_FUSED = {f"blocks.{{}}.attention.{x}": f"blk.{{}}.attn_qkv.{x}" for x in "qkv"}
_LAYOUTS: Mapping[str, Layout] = {
    # llama.cpp turns neighbouring dimensions here, so q and k were permuted when they were converted
    "llama": Layout(_NAMES, interleaved=True, unused=_UNUSED),
    "qwen2": _PLAIN,
    "qwen3": _PLAIN,
    "gemma": _PLAIN,  # the converter has added 1 to the gains
    "gpt2": Layout(_NAMES | _FUSED, fused="attn_qkv"),
}
_ACTIVATIONS = {"gemma": "gelu_tanh", "gpt2": "gelu_tanh"}
# settings that, unless they are 0, change what is computed
_REFUSED = {
    "expert_count": "a mixture of experts",
    "attn_logit_softcapping": "soft capping of attention scores",
    "final_logit_softcapping": "soft capping of logits",
    "attention.max_alibi_bias": "ALiBi",
    "attention.clamp_kqv": "clamped projections",
}
_MISSING = object()


class Metadata:
    """The key-value pairs of a GGUF file, those of its architecture without the architecture's name."""

    def __init__(self, pairs: Mapping[str, Any]) -> None:
        self._pairs = pairs
        self.architecture: str = self.get("general.architecture", str)

    def get(self, key: str, kind: type, default: Any = _MISSING) -> Any:
        """A value; InputError if it is no `kind`, or missing without a default."""
        value = self._pairs.get(key, default)
        if value is _MISSING:
            raise InputError(f"the GGUF file's metadata lacks {key}")
        if value is default:
            return value
        if kind is int and isinstance(value, list):
            raise UnsupportedError(f"{key} differs from layer to layer, which is not supported")
        if not isinstance(value, kind) or (isinstance(value, float) and not math.isfinite(value)):
            raise InputError(f"{key} in the GGUF file's metadata is no {kind.__name__}")
        return value

    def own(self, key: str, kind: type, default: Any = _MISSING) -> Any:
        """A value of the architecture's."""
        return self.get(f"{self.architecture}.{key}", kind, default)

    def whole(self, key: str, default: Any = _MISSING) -> int:
        """A positive number of the architecture's."""
        value: int = self.own(key, int, default)
        if value < 1:
            raise InputError(f"{self.architecture}.{key} in the GGUF file's metadata should be 1 or more")
        return value


class _Reader(gguf.GGUFReader):
    """The library's reader, in a third of its time: a plain view of the file is sliced faster than a memory map."""

    def _get(self, *arguments: Any, **options: Any) -> Any:
        if isinstance(self.data, numpy.memmap):
            self.data = self.data.view(numpy.ndarray)  # type: ignore[assignment]
        return super()._get(*arguments, **options)


def load(path: Path, context: int | None = None) -> Loaded:
    """The decoder in a GGUF file, as float32 in eval mode, for up to `context` positions.

    Without one it takes what the model was made for, 2048 at most. Raises InputError for a file that is damaged or
    contradicts itself, UnsupportedError for architectures, settings and quantisations that aren't supported.
    """
    try:
        reader = _Reader(path)
        metadata = Metadata({name: field.contents() for name, field in reader.fields.items()})
    except InputError:
        raise
    except Exception as error:  # whatever a damaged file makes the library raise
        raise InputError(f"{path} is a damaged or truncated GGUF file ({type(error).__name__})") from error
    layout = _LAYOUTS.get(metadata.architecture)
    if layout is None:
        known = ", ".join(sorted(_LAYOUTS))
        raise UnsupportedError(f"GGUF architecture {metadata.architecture!r} has no importer. Supported: {known}")
    tensors = {tensor.name: _floats(tensor) for tensor in reader.tensors}
    if "token_embd.weight" not in tensors or tensors["token_embd.weight"].dim() != 2:
        raise InputError(f"{path} lacks the table of embeddings, token_embd.weight")
    head = tensors.get("output.weight")
    if head is not None and head.equal(tensors["token_embd.weight"]):
        head = None  # a copy: one secret is enough
    config = _config(metadata, tensors, context, tied=head is None)
    model = filled(config, tensors, layout, "the file's metadata")
    return loaded_decoder(model, f"GGUF {metadata.architecture}", vocabulary(metadata, config.vocabulary))


def _floats(tensor: Any) -> torch.Tensor:
    """A tensor of any quantisation, float32."""
    try:
        found = gguf.dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError as error:
        name = getattr(tensor.tensor_type, "name", tensor.tensor_type)
        raise UnsupportedError(f"{tensor.name} is quantised as {name}, which is not supported") from error
    except Exception as error:
        raise InputError(f"{tensor.name} in the GGUF file is damaged ({type(error).__name__})") from error
    return torch.from_numpy(numpy.array(found, dtype=numpy.float32))  # a copy: the file's own memory is read-only


def _config(metadata: Metadata, tensors: Mapping[str, torch.Tensor], asked: int | None, tied: bool) -> DecoderConfig:
    for key, what in _REFUSED.items():
        if metadata.own(key, object, 0):
            raise UnsupportedError(f"{metadata.architecture}.{key} is set: {what} is not supported")
    classic = metadata.architecture == "gpt2"
    width, heads = metadata.whole("embedding_length"), metadata.whole("attention.head_count")
    head_dim = metadata.whole("attention.key_length", width // heads)
    if metadata.whole("attention.value_length", head_dim) != head_dim:
        raise UnsupportedError("keys and values of different lengths are not supported")
    longest = metadata.whole("context_length")
    context = chosen_context(asked, longest)
    window = metadata.own("attention.sliding_window", int, 0)
    layers = metadata.whole("block_count")
    return DecoderConfig(
        vocabulary=tensors["token_embd.weight"].shape[0],
        context=context,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=metadata.whole("attention.head_count_kv", heads),
        head_dim=head_dim,
        hidden=metadata.whole("feed_forward_length"),
        activation=_ACTIVATIONS.get(metadata.architecture, "silu"),
        eps=metadata.own("attention.layer_norm_epsilon" if classic else "attention.layer_norm_rms_epsilon", float),
        rope=None if classic else _rope(metadata, tensors.get("rope_freqs.weight"), head_dim, longest),
        norm="layer" if classic else "rms",
        gated=not classic,
        tied=tied,
        scale=head_dim**-0.5,
        windows=(window if 0 < window < context else 0,) * layers,
        embedding_scale=width**0.5 if metadata.architecture == "gemma" else 1.0,
    ).checked()


def _rope(metadata: Metadata, factors: torch.Tensor | None, head_dim: int, longest: int) -> Rope:
    if metadata.whole("rope.dimension_count", head_dim) != head_dim:
        raise UnsupportedError("rotary embeddings of a part of each head are not supported")
    theta = metadata.own("rope.freq_base", float, 10000.0)
    old = metadata.own("rope.scale_linear", float, 1.0)  # as files said it before there were several kinds
    kind = metadata.own("rope.scaling.type", str, "none" if old == 1 else "linear")
    factor = metadata.own("rope.scaling.factor", float, old)
    if kind == "none" or (kind == "linear" and factor in (0, 1)):
        found = rope.plain(theta, head_dim)
    elif kind == "linear":
        found = rope.linear(theta, head_dim, factor)
    elif kind == "yarn":
        original = metadata.whole("rope.scaling.original_context_length", longest)
        found = rope.yarn(theta, head_dim, factor, original)
        found = Rope(found.frequencies, found.magnitude * metadata.own("rope.scaling.attn_factor", float, 1.0))
    else:
        raise UnsupportedError(f"rotary embeddings are scaled by {kind!r}: only none, linear and yarn are supported")
    return found if factors is None else _divided(found, factors.flatten().tolist())


def _divided(found: Rope, factors: Iterable[float]) -> Rope:
    try:
        return found.divided(list(factors))
    except (ValueError, ZeroDivisionError) as error:
        raise InputError("rope_freqs.weight should hold one factor, not 0, for each pair of a head") from error
