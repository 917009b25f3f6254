"""What the families of decoders on Hugging Face call the sizes and tensors that `models.decoder` knows by one name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mpcinfer.models.decoder_fill import Layout


@dataclass(frozen=True)
class Family:
    """One lineage of checkpoints.

    sizes: fields of DecoderConfig in config.json. activation, eps: what config.json calls these. classic: LayerNorm,
    learned positions and a plain MLP, as GPT-2 has them, rather than RMSNorm, rotary positions and a gated MLP. tied:
    whether head and embedding are one where config.json says nothing. scaled: whether scores are divided by
    sqrt(head_dim), enlarged: whether embeddings are multiplied with sqrt(width). windowed: whether a sliding_window
    that config.json names counts in all layers. activations: where names in config.json mean something of their own.
    """

    sizes: Mapping[str, str]
    activation: str
    eps: str
    layout: Layout
    classic: bool = False
    tied: bool = False
    scaled: bool = True
    enlarged: bool = False
    windowed: bool = False
    activations: Mapping[str, str] = field(default_factory=dict)


_LLAMA = Family(
    sizes={
        "vocabulary": "vocab_size",
        "context": "max_position_embeddings",
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads",
        "head_dim": "head_dim",
        "hidden": "intermediate_size",
    },
    activation="hidden_act",
    eps="rms_norm_eps",
    layout=Layout(
        names={
            "embedding": "embed_tokens",
            "norm": "norm",
            "head": "lm_head",
            "blocks.{}.attention_norm": "layers.{}.input_layernorm",
            **{f"blocks.{{}}.attention.{x}": f"layers.{{}}.self_attn.{x}_proj" for x in "qkv"},
            "blocks.{}.attention.out": "layers.{}.self_attn.o_proj",
            **{f"blocks.{{}}.attention.{x}_norm": f"layers.{{}}.self_attn.{x}_norm" for x in "qk"},
            "blocks.{}.norm": "layers.{}.post_attention_layernorm",
            **{f"blocks.{{}}.mlp.{x}": f"layers.{{}}.mlp.{x}_proj" for x in ("gate", "up", "down")},
        },
        prefixes=("model.",),
        buffers=("rotary_emb.inv_freq",),
    ),
)

_GPT2 = Family(
    sizes={
        "vocabulary": "vocab_size",
        "context": "n_positions",
        "width": "n_embd",
        "layers": "n_layer",
        "heads": "n_head",
        "hidden": "n_inner",
    },
    activation="activation_function",
    eps="layer_norm_epsilon",
    layout=Layout(
        names={
            "embedding": "wte",
            "positions": "wpe",
            "norm": "ln_f",
            "head": "lm_head",
            "blocks.{}.attention_norm": "h.{}.ln_1",
            **{f"blocks.{{}}.attention.{x}": f"h.{{}}.attn.c_attn.{x}" for x in "qkv"},
            "blocks.{}.attention.out": "h.{}.attn.c_proj",
            "blocks.{}.norm": "h.{}.ln_2",
            "blocks.{}.mlp.up": "h.{}.mlp.c_fc",
            "blocks.{}.mlp.down": "h.{}.mlp.c_proj",
        },
        prefixes=("transformer.",),
        fused="c_attn",
        transposed=True,
        buffers=(".attn.bias", ".attn.masked_bias"),
    ),
    classic=True,
    tied=True,
)

_GPT_NEO = replace(
    _GPT2,
    sizes={
        "vocabulary": "vocab_size",
        "context": "max_position_embeddings",
        "width": "hidden_size",
        "layers": "num_layers",
        "heads": "num_heads",
        "hidden": "intermediate_size",
    },
    layout=Layout(
        names={
            **_GPT2.layout.names,
            **{f"blocks.{{}}.attention.{x}": f"h.{{}}.attn.attention.{x}_proj" for x in "qkv"},
            "blocks.{}.attention.out": "h.{}.attn.attention.out_proj",
        },
        prefixes=("transformer.",),
        buffers=(".attn.attention.bias", ".attn.attention.masked_bias"),
    ),
    scaled=False,
)

FAMILIES: Mapping[str, Family] = {
    "llama": _LLAMA,
    "mistral": replace(_LLAMA, windowed=True),
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": replace(
        _LLAMA,
        layout=replace(_LLAMA.layout, gain=1.0),
        tied=True,
        enlarged=True,
        activations={"gelu": "gelu_tanh"},  # what early releases said and did not mean
    ),
    "gpt2": _GPT2,
    "gpt_neo": _GPT_NEO,
}
"""By the model_type of config.json. SmolLM, and others with it, are of type llama."""

# what each of these settings may be; anything else changes what is computed
ACCEPTED: Mapping[str, tuple[Any, ...]] = {
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "num_experts": (None, 0),
    "num_local_experts": (None, 0),
    "quantization_config": (None,),
    "partial_rotary_factor": (None, 1.0),
    "use_bidirectional_attention": (None, False),
    "add_cross_attention": (None, False),
    "is_encoder_decoder": (None, False),
    "scale_attn_weights": (None, True),
    "scale_attn_by_inverse_layer_idx": (None, False),
}
