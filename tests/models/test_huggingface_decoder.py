"""Decoders from Hugging Face directories against transformers, and every directory that is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mpcinfer.errors import InputError, UnsupportedError
from mpcinfer.models.decoder import Decoder
from mpcinfer.models.huggingface_decoder import load
from mpcinfer.models.load import load as load_any
from mpcinfer.models.loaded import InputSpec, Sizes
from tests.models import decoders
from tests.models.test_huggingface import change, rewrite, shard

LLAMA3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0} | {
    "original_max_position_embeddings": 16
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 6}
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    *((family, {}) for family in decoders.FAMILIES),
    ("llama", {"tie_word_embeddings": True}),
    ("llama", {"attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4}),
    ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}}),
    ("llama", {"rope_parameters": LLAMA3 | {"rope_theta": 500.0}, "head_dim": 16}),
    ("llama", {"rope_parameters": YARN | {"rope_theta": 500.0}, "head_dim": 16}),
    ("llama", {"rope_parameters": YARN | {"rope_theta": 9.0, "mscale": 0.7, "mscale_all_dim": 1.0, "truncate": False}}),
    ("mistral", {"sliding_window": None}),
    ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    ("qwen3", {"attention_bias": True, "tie_word_embeddings": True}),
    ("gpt2", {"activation_function": "gelu", "n_inner": 20, "tie_word_embeddings": False}),
    ("gpt_neo", {"attention_types": [[["global"], 2]], "intermediate_size": 20}),
]


def decoder(directory: Path, context: int | None = None) -> Decoder:
    """What is loaded from a directory."""
    model = load_any(directory, context=context).module
    assert isinstance(model, Decoder) and not model.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())
    return model


def assert_same(model: Decoder, theirs: nn.Module) -> None:
    """Ours is theirs, without a cache and with one that grew in several steps."""
    for tokens, chunks in ((decoders.ids(1), (1,)), (decoders.ids(12), (5, 1, 4, 2)), (decoders.ids(24), (23, 1))):
        logits, *caches = model(tokens, *model.empty_caches())
        assert logits.shape == (1, decoders.VOCABULARY)
        assert (logits - decoders.expected(theirs, tokens)).abs().max() <= 1e-4
        for whole, parts in zip((logits, *caches), decoders.in_chunks(model, tokens, *chunks), strict=True):
            assert (whole - parts).abs().max() <= 1e-4


@pytest.mark.parametrize(("family", "settings"), VARIANTS)
def test_every_family_equals_transformers(family: str, settings: dict[str, Any], tmp_path: Path) -> None:
    theirs = decoders.make(family, tmp_path, **settings)
    assert_same(decoder(tmp_path), theirs)


def test_what_is_loaded(tmp_path: Path) -> None:
    decoders.make("llama", tmp_path)
    loaded = load_any(tmp_path, task="text-generation")
    assert (loaded.kind, loaded.context, loaded.vocabulary) == ("Hugging Face llama, text-generation", 24, None)
    assert loaded.inputs[0] == InputSpec("ids", "int", (1, Sizes(1, 24)))
    assert loaded.inputs[1] == InputSpec("keys0", "float", (1, 2, Sizes(0, 24), 4))
    assert [spec.name for spec in loaded.inputs] == ["ids", "keys0", "values0", "keys1", "values1"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "mistral"])
def test_tables_are_as_long_as_the_context(family: str, tmp_path: Path) -> None:
    theirs = decoders.make(family, tmp_path)
    model, tokens = decoder(tmp_path, 5), decoders.ids(5)
    assert (model(tokens, *model.empty_caches())[0] - decoders.expected(theirs, tokens)).abs().max() <= 1e-4
    tables = [model.positions.weight] if family == "gpt2" else [model.turn]
    assert all(table.shape[0] == 5 for table in tables)
    assert set(model.config.windows) == {0}  # a window as long as the context is none
    for context in (0, 25):
        with pytest.raises(InputError, match=f"a context of {context} tokens: this model takes 1 to 24"):
            load(tmp_path, context=context)


def test_a_long_context_is_not_built_unasked(tmp_path: Path) -> None:
    decoders.make("llama", tmp_path, max_position_embeddings=4096)
    assert load(tmp_path).context == 2048
    assert load(tmp_path, context=4096).context == 4096


def test_a_checkpoint_in_parts(tmp_path: Path) -> None:
    theirs = decoders.make("llama", tmp_path)
    shard(tmp_path)
    assert_same(decoder(tmp_path), theirs)


def test_older_spellings(tmp_path: Path) -> None:
    scaling = {"type": "linear", "factor": 2.0}
    theirs = decoders.make(
        "llama", tmp_path, rope_parameters={"rope_theta": 500.0, "rope_type": "linear", "factor": 2.0}
    )
    change(tmp_path / "config.json", rope_parameters=None, rope_scaling=scaling, rope_theta=500.0, head_dim=None)
    rewrite(tmp_path, lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    assert_same(decoder(tmp_path), theirs)
    theirs = decoders.make("gpt2", tmp_path)
    masks = {"transformer.h.0.attn.bias": torch.ones(24, 24), "transformer.h.0.attn.masked_bias": torch.tensor(-1e4)}
    rewrite(tmp_path, lambda tensors: {k.removeprefix("transformer."): v for k, v in (tensors | masks).items()})
    assert_same(decoder(tmp_path), theirs)


def test_a_tied_head_is_one_parameter(tmp_path: Path) -> None:
    decoders.make("llama", tmp_path, tie_word_embeddings=True)
    rewrite(tmp_path, lambda tensors: tensors | {"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    assert [name for name in decoder(tmp_path).state_dict() if "blocks" not in name] == [
        "embedding.weight",
        "norm.weight",
    ]


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"model_type": "gemma2"}, "'gemma2' has no importer. Supported: bert, .*, gpt2, .*, llama, "),
        ("gemma", {"final_logit_softcapping": 30.0}, "final_logit_softcapping is set"),
        ("llama", {"num_local_experts": 8}, "num_local_experts"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 2.0}}, "type 'dynamic'"),
        ("llama", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "differ from layer to layer"),
        ("llama", {"hidden_act": "quick_gelu"}, "activation 'quick_gelu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ("gpt_neo", {"attention_types": [[["global", "sparse"], 1]]}, "type sparse"),
    ],
)
def test_models_that_are_something_else(family: str, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    decoders.make(family, tmp_path)
    change(tmp_path / "config.json", **settings)
    with pytest.raises(UnsupportedError, match=message):
        load_any(tmp_path)


@pytest.mark.parametrize(
    ("family", "settings", "message"),
    [
        ("llama", {"hidden_size": None}, "should set hidden_size"),
        ("llama", {"num_hidden_layers": "two"}, "set num_hidden_layers to a whole number"),
        ("llama", {"rms_norm_eps": None}, "set rms_norm_eps to a positive number"),
        ("llama", {"num_key_value_heads": 3}, "contradict each other: 4 heads, 3 of keys"),
        ("llama", {"vocab_size": 61}, r"embed_tokens.weight has shape \[60, 16\] where config.json demands \[61, 16\]"),
        ("llama", {"num_hidden_layers": 3}, "the checkpoint lacks layers.2"),
        ("llama", {"rope_parameters": {"rope_theta": 1e4, "rope_type": "linear"}}, "set factor to a positive number"),
        ("llama", {"rope_parameters": YARN | {"rope_theta": 1.0}}, "scaled contradict each other"),
        ("llama", {"rope_parameters": {"rope_theta": 0.5}}, "a base above 1, not 0.5"),
        ("gpt_neo", {"attention_types": [[["global"], 3]]}, "describes 3 layers of 2"),
        ("gpt_neo", {"attention_types": ["global"]}, "attention_types in config.json should list pairs"),
    ],
)
def test_settings_that_do_not_fit_the_tensors(
    family: str, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    decoders.make(family, tmp_path)
    change(tmp_path / "config.json", **settings)
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_other_tasks_and_tensors_without_a_use(tmp_path: Path) -> None:
    decoders.make("llama", tmp_path)
    with pytest.raises(InputError, match="a decoder, whose task is text-generation, not 'fill-mask'"):
        load_any(tmp_path, task="fill-mask")
    rewrite(tmp_path, lambda tensors: tensors | {"score.weight": torch.ones(2)})
    with pytest.raises(UnsupportedError, match="no use for: score.weight$"):
        load(tmp_path)
