"""GGUF files as llama.cpp's converter writes them, made of models that are there already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGMLQuantizationType

from mpcinfer.models.decoder import Decoder

NAMES = {
    "embedding": "token_embd",
    "positions": "position_embd",
    "norm": "output_norm",
    "head": "output",
    "attention_norm": "attn_norm",
    "attention.q": "attn_q",
    "attention.k": "attn_k",
    "attention.v": "attn_v",
    "attention.out": "attn_output",
    "attention.q_norm": "attn_q_norm",
    "attention.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
F32, F16, Q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0


def rounded(x: torch.Tensor, kind: GGMLQuantizationType) -> torch.Tensor:
    """What is left of a tensor when it is stored as `kind`."""
    return torch.from_numpy(gguf.dequantize(gguf.quantize(x.numpy(), kind), kind).copy()).reshape(x.shape)


def write(
    path: Path, architecture: str, model: Decoder, kind: GGMLQuantizationType = F32, **metadata: Any
) -> dict[str, torch.Tensor]:
    """Write `model` to `path`, matrices stored as `kind`; the tensors as they were before. None removes metadata."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in {**sizes(architecture, model), **metadata}.items():
        name = key if "." in key and key.split(".")[0] in ("tokenizer", "general") else f"{architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value is not None:
            writer.add_array(name, value)
    found = tensors(architecture, model)
    for name, tensor in found.items():
        stored = kind if tensor.dim() > 1 else F32
        writer.add_tensor(name, gguf.quantize(tensor.numpy(), stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return found


def sizes(architecture: str, model: Decoder) -> dict[str, Any]:
    """The metadata of a model of two layers."""
    config = model.config
    found = {
        "context_length": config.context,
        "embedding_length": config.width,
        "block_count": config.layers,
        "feed_forward_length": config.hidden,
        "attention.head_count": config.heads,
        "attention.head_count_kv": config.kv_heads,
    }
    if architecture == "gpt2":
        return found | {"attention.layer_norm_epsilon": config.eps}
    return found | {
        "attention.layer_norm_rms_epsilon": config.eps,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": 10000.0,
    }


def tensors(architecture: str, model: Decoder) -> dict[str, torch.Tensor]:
    """The tensors by the names of the format, laid out as its converter lays them out."""
    found = {}
    for name, tensor in model.state_dict().items():
        module, _, role = name.rpartition(".")
        *layer, module = module.split(".", 2) if module.startswith("blocks") else (module,)
        theirs = "ffn_norm" if layer and module == "norm" else NAMES[module]
        before = f"blk.{layer[1]}." if layer else ""
        if architecture == "llama" and module in ("attention.q", "attention.k"):
            heads = model.config.heads if module.endswith("q") else model.config.kv_heads
            tensor = torch.cat([torch.stack(head.chunk(2), 1).flatten(0, 1) for head in tensor.chunk(heads)])
        found[f"{before}{theirs}.{role}"] = tensor.contiguous()
    if architecture == "gpt2":
        for i in range(model.config.layers):
            for role in ("weight", "bias"):
                parts = [found.pop(f"blk.{i}.attn_{x}.{role}") for x in "qkv"]
                found[f"blk.{i}.attn_qkv.{role}"] = torch.cat(parts)
    return found
