"""What the families of encoders on Hugging Face call the sizes and tensors that `models.encoder` knows by one name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Family:
    """One lineage of checkpoints.

    sizes, activation: fields of EncoderConfig in config.json. names: modules of Encoder in the checkpoint, `{}` for a
    layer's number; of several the rows are put one below the other. heads: the modules of each task's head.
    """

    prefix: str
    sizes: Mapping[str, str]
    activation: str
    names: Mapping[str, tuple[str, ...]]
    heads: Mapping[str, Mapping[str, str]]
    classifier_activation: str
    word_activation: str | None  # None: the same as in the layers
    word_bias: str
    token_types: bool
    offset_positions: bool  # whether the first position is the one after the padding token's id
    eps: float | None = None  # where it is no setting


_BERT = Family(
    prefix="bert.",
    sizes={
        "vocabulary": "vocab_size",
        "positions": "max_position_embeddings",
        "width": "hidden_size",
        "layers": "num_hidden_layers",
        "heads": "num_attention_heads",
        "hidden": "intermediate_size",
    },
    activation="hidden_act",
    names={
        "words": ("embeddings.word_embeddings",),
        "norm": ("embeddings.LayerNorm",),
        "blocks.{}.attention.qkv": tuple(f"encoder.layer.{{}}.attention.self.{x}" for x in ("query", "key", "value")),
        "blocks.{}.attention.out": ("encoder.layer.{}.attention.output.dense",),
        "blocks.{}.attention_norm": ("encoder.layer.{}.attention.output.LayerNorm",),
        "blocks.{}.up": ("encoder.layer.{}.intermediate.dense",),
        "blocks.{}.down": ("encoder.layer.{}.output.dense",),
        "blocks.{}.norm": ("encoder.layer.{}.output.LayerNorm",),
    },
    heads={
        "text-classification": {"dense": "pooler.dense", "output": "classifier"},
        "token-classification": {"output": "classifier"},
        "question-answering": {"output": "qa_outputs"},
        "fill-mask": {
            "dense": "cls.predictions.transform.dense",
            "norm": "cls.predictions.transform.LayerNorm",
            "output": "cls.predictions.decoder",
        },
    },
    classifier_activation="tanh",
    word_activation=None,
    word_bias="cls.predictions.bias",
    token_types=True,
    offset_positions=False,
)

_ROBERTA = replace(
    _BERT,
    prefix="roberta.",
    heads={
        **_BERT.heads,
        "text-classification": {"dense": "classifier.dense", "output": "classifier.out_proj"},
        "fill-mask": {"dense": "lm_head.dense", "norm": "lm_head.layer_norm", "output": "lm_head.decoder"},
    },
    word_activation="gelu",
    word_bias="lm_head.bias",
    offset_positions=True,
)

_DISTILBERT = Family(
    prefix="distilbert.",
    sizes={
        "vocabulary": "vocab_size",
        "positions": "max_position_embeddings",
        "width": "dim",
        "layers": "n_layers",
        "heads": "n_heads",
        "hidden": "hidden_dim",
    },
    activation="activation",
    names={
        "words": ("embeddings.word_embeddings",),
        "norm": ("embeddings.LayerNorm",),
        "blocks.{}.attention.qkv": tuple(f"transformer.layer.{{}}.attention.{x}_lin" for x in "qkv"),
        "blocks.{}.attention.out": ("transformer.layer.{}.attention.out_lin",),
        "blocks.{}.attention_norm": ("transformer.layer.{}.sa_layer_norm",),
        "blocks.{}.up": ("transformer.layer.{}.ffn.lin1",),
        "blocks.{}.down": ("transformer.layer.{}.ffn.lin2",),
        "blocks.{}.norm": ("transformer.layer.{}.output_layer_norm",),
    },
    heads={
        "text-classification": {"dense": "pre_classifier", "output": "classifier"},
        "token-classification": {"output": "classifier"},
        "question-answering": {"output": "qa_outputs"},
        "fill-mask": {"dense": "vocab_transform", "norm": "vocab_layer_norm", "output": "vocab_projector"},
    },
    classifier_activation="relu",
    word_activation=None,
    word_bias="vocab_projector.bias",
    token_types=False,
    offset_positions=False,
    eps=1e-12,
)

FAMILIES: Mapping[str, Family] = {
    "bert": _BERT,
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": _DISTILBERT,
}

ACTIVATIONS: Mapping[str, str] = {
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""The activations of config.json in `encoder.ACTIVATIONS`."""

# What a checkpoint may hold and this task not need: other tasks' heads, and numbers that count from 0.
UNUSED = (
    "pooler.",
    "classifier.",
    "pre_classifier.",
    "qa_outputs.",
    "cls.",
    "lm_head.",
    "vocab_transform.",
    "vocab_layer_norm.",
    "vocab_projector.",
    "embeddings.position_ids",
    "embeddings.token_type_ids",
)
