"""Encoders from Hugging Face directories against transformers, and every directory that is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mpcinfer.errors import InputError, UnsupportedError
from mpcinfer.models.huggingface import TASKS, load
from mpcinfer.models.loaded import InputSpec, Sizes
from tests.models import oracle

WEIGHTS, CONFIG = "model.safetensors", "config.json"
TASKS_OF_THE_ORACLE = list(oracle.ARCHITECTURES)


def change(path: Path, **settings: Any) -> None:
    """Set entries of a JSON file; None deletes one."""
    found = json.loads(path.read_text()) | settings
    path.write_text(json.dumps({k: v for k, v in found.items() if v is not None}))


def rewrite(directory: Path, edit: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    """Write the checkpoint again as `edit` returns it."""
    tensors = {name: tensor.clone() for name, tensor in load_file(directory / WEIGHTS).items()}
    save_file({name: tensor.contiguous() for name, tensor in edit(tensors).items()}, directory / WEIGHTS)


def shard(directory: Path) -> None:
    """Split the checkpoint over two files."""
    tensors = load_file(directory / WEIGHTS)
    names = sorted(tensors)
    places = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, directory / file)
    (directory / WEIGHTS).unlink()
    (directory / f"{WEIGHTS}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))


def assert_same(directory: Path, theirs: nn.Module, task: str | None = None) -> None:
    """Ours is theirs on a batch and on single sequences of several lengths."""
    model = load(directory, task).module
    assert isinstance(model, nn.Module) and not model.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())
    for tokens in (oracle.ids(2, 9), oracle.ids(1, 1), oracle.ids(1, 22)):
        expected = oracle.evaluate(theirs, tokens)
        assert (model(tokens) - expected).abs().max() <= 1e-5
        assert (model(tokens[0]) - expected[0]).abs().max() <= 1e-5


@pytest.mark.parametrize("task", TASKS_OF_THE_ORACLE)
@pytest.mark.parametrize("family", oracle.FAMILIES)
def test_every_family_and_head_equals_transformers(family: str, task: str, tmp_path: Path) -> None:
    theirs = oracle.make(family, task, tmp_path)
    assert_same(tmp_path, theirs)
    loaded = load(tmp_path)
    longest = 24 if family in ("bert", "distilbert") else 22
    assert loaded.inputs == (InputSpec("ids", "int", (Sizes(1, longest),)),)
    assert loaded.kind == f"Hugging Face {family}, {task}"
    assert loaded.tokenizer is None
    assert loaded.labels == (("LABEL_0", "LABEL_1", "LABEL_2") if task.endswith("-classification") else ())


@pytest.mark.parametrize("activation", ["gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "relu", "silu", "swish"])
def test_activations(activation: str, tmp_path: Path) -> None:
    for family in ("bert", "roberta"):
        assert_same(tmp_path, oracle.make(family, "fill-mask", tmp_path, hidden_act=activation))
    assert_same(tmp_path, oracle.make("distilbert", "fill-mask", tmp_path, activation=activation))


@pytest.mark.parametrize("family", ["bert", "roberta", "distilbert"])
@pytest.mark.parametrize("tied", [True, False])
def test_a_decoder_tied_to_the_words_is_one_parameter(family: str, tied: bool, tmp_path: Path) -> None:
    assert_same(tmp_path, oracle.make(family, "fill-mask", tmp_path, tie_word_embeddings=tied))
    model = load(tmp_path).module
    assert isinstance(model, nn.Module)
    assert (model.head.output.weight is model.words.weight) == tied


def test_a_model_may_serve_another_task_that_its_tensors_allow(tmp_path: Path) -> None:
    theirs = oracle.make("bert", "text-classification", tmp_path)
    assert_same(tmp_path, theirs.bert, "feature-extraction")
    tokens = oracle.ids(2, 5)
    mean = nn.functional.normalize(oracle.evaluate(theirs.bert, tokens).mean(1))
    assert (load(tmp_path, "sentence-embedding").module(tokens) - mean).abs().max() <= 1e-5
    with pytest.raises(InputError, match="lacks qa_outputs.bias, qa_outputs.weight"):
        load(tmp_path, "question-answering")
    with pytest.raises(InputError, match="'poetry' is not a task: choose one of feature-extraction,"):
        load(tmp_path, "poetry")


@pytest.mark.parametrize("rename", ["bert.", "model.", "layer-norms"])
def test_names_that_checkpoints_use(rename: str, tmp_path: Path) -> None:
    theirs = oracle.make("bert", "feature-extraction", tmp_path)
    if rename == "layer-norms":  # as the first checkpoints of BERT spell them

        def old(name: str) -> str:
            return name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")
    else:

        def old(name: str) -> str:
            return rename + name

    rewrite(tmp_path, lambda tensors: {old(name): tensor for name, tensor in tensors.items()})
    assert_same(tmp_path, theirs)


def test_what_pre_training_leaves_behind(tmp_path: Path) -> None:
    theirs = oracle.make("bert", "fill-mask", tmp_path)
    change(tmp_path / CONFIG, architectures=["BertForPreTraining"])
    left = {"cls.seq_relationship.weight": torch.ones(2, 16), "bert.pooler.dense.weight": torch.ones(16, 16)}
    rewrite(tmp_path, lambda tensors: tensors | left)
    assert_same(tmp_path, theirs)


def test_a_checkpoint_in_several_files(tmp_path: Path) -> None:
    theirs = oracle.make("roberta", "token-classification", tmp_path)
    shard(tmp_path)
    assert_same(tmp_path, theirs)


def test_half_precision_becomes_float32(tmp_path: Path) -> None:
    theirs = oracle.make("distilbert", "text-classification", tmp_path).half().float()
    rewrite(tmp_path, lambda tensors: {name: tensor.half() for name, tensor in tensors.items()})
    assert_same(tmp_path, theirs)


def test_buffers_that_count_positions_are_no_weights(tmp_path: Path) -> None:
    theirs = oracle.make("bert", "feature-extraction", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {"embeddings.position_ids": torch.arange(24)[None]})
    assert_same(tmp_path, theirs)


def sentence_transformer(directory: Path, *modules: str, root: str = "", **pooling: Any) -> nn.Module:
    """A BERT with what sentence-transformers writes beside it."""
    theirs = oracle.make("bert", "feature-extraction", directory / root)
    places = {"Transformer": root, "Pooling": "1_Pooling"}
    listed = [{"type": f"sentence_transformers.models.{m}", "path": places.get(m, m)} for m in modules]
    (directory / "modules.json").write_text(json.dumps(listed))
    (directory / "1_Pooling").mkdir()
    (directory / "1_Pooling" / CONFIG).write_text(json.dumps({"word_embedding_dimension": 16} | pooling))
    return theirs


@pytest.mark.parametrize("root", ["", "0_Transformer"])
@pytest.mark.parametrize("normalised", [True, False])
@pytest.mark.parametrize(
    ("pooling", "mean"),
    [
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, True),
        ({"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, False),
        ({"pooling_mode": "mean"}, True),
        ({"pooling_mode": "cls"}, False),
    ],
)
def test_sentence_transformers_say_how_they_pool(
    pooling: dict[str, Any], mean: bool, normalised: bool, root: str, tmp_path: Path
) -> None:
    modules = ["Transformer", "Pooling", "Normalize"][: 3 if normalised else 2]
    theirs = sentence_transformer(tmp_path, *modules, root=root, **pooling)
    loaded, tokens = load(tmp_path), oracle.ids(2, 7)
    assert loaded.kind == "Hugging Face bert, sentence-embedding"
    hidden = oracle.evaluate(theirs, tokens)
    expected = hidden.mean(1) if mean else hidden[:, 0]
    expected = nn.functional.normalize(expected) if normalised else expected
    assert (loaded.module(tokens) - expected).abs().max() <= 1e-5


def test_a_tokenizer_is_found(tmp_path: Path) -> None:
    oracle.make("bert", "feature-extraction", tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    assert load(tmp_path).tokenizer == tmp_path / "tokenizer.json"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"model_type": "deberta-v2"},
            "'deberta-v2' has no importer. Supported: bert, camembert, distilbert, .*roberta",
        ),
        ({"model_type": None}, "model_type None has no importer"),
        ({"position_embedding_type": "relative_key"}, "position_embedding_type 'relative_key' .*, only 'absolute'"),
        ({"is_decoder": True}, "is_decoder"),
        ({"add_cross_attention": True}, "add_cross_attention"),
        ({"hidden_act": "quick_gelu"}, "activation 'quick_gelu' is not supported, only gelu,"),
        ({"architectures": ["BertForMultipleChoice"]}, "BertForMultipleChoice is not supported, only ...Model"),
        ({"architectures": ["BertLMHeadModel"]}, "BertLMHeadModel"),
    ],
)
def test_models_that_are_something_else(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    oracle.make("bert", "feature-extraction", tmp_path)
    change(tmp_path / CONFIG, **settings)
    with pytest.raises(UnsupportedError, match=message):
        load(tmp_path)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"architectures": None}, "names no architecture: say which task, one of feature-extraction"),
        ({"hidden_size": None}, "set hidden_size to a whole number, 1 or more"),
        ({"num_hidden_layers": "two"}, "num_hidden_layers"),
        ({"layer_norm_eps": None}, "layer_norm_eps"),
        ({"num_attention_heads": 3}, "width 16, 3 heads, 24 positions"),
        ({"vocab_size": 61}, r"word_embeddings.weight has shape \[60, 16\] where config.json demands \[61, 16\]"),
        ({"num_hidden_layers": 3}, "lacks encoder.layer.2.attention.output.LayerNorm.bias, .* and 8 more"),
        ({"id2label": {"0": "a"}}, "id2label in config.json should name the classes 0 to 2"),
    ],
)
def test_settings_that_do_not_fit_the_tensors(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    oracle.make("bert", "text-classification", tmp_path)
    change(tmp_path / CONFIG, **settings)
    with pytest.raises(InputError, match=message):
        load(tmp_path)


def test_positions_that_count_from_the_padding_token_need_to_know_it(tmp_path: Path) -> None:
    oracle.make("roberta", "feature-extraction", tmp_path)
    change(tmp_path / CONFIG, pad_token_id=None)
    with pytest.raises(InputError, match="set pad_token_id to a whole number, 0 or more"):
        load(tmp_path)


def test_a_directory_without_configuration(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="config.json cannot be read"):
        load(tmp_path)


def test_tensors_without_a_use_are_listed(tmp_path: Path) -> None:
    oracle.make("bert", "feature-extraction", tmp_path)
    rewrite(tmp_path, lambda tensors: tensors | {"adapter.up": torch.ones(2), "encoder.layer.2.x": torch.ones(2)})
    with pytest.raises(UnsupportedError, match="no use for: adapter.up, encoder.layer.2.x$"):
        load(tmp_path)


@pytest.mark.parametrize(
    ("modules", "pooling", "message"),
    [
        (["Transformer", "Pooling", "Dense"], {"pooling_mode": "mean"}, "Transformer, Pooling, Dense"),
        (["CLIPModel"], {"pooling_mode": "mean"}, "CLIPModel"),
        (["Transformer", "Pooling"], {"pooling_mode_max_tokens": True}, "pooling by max_tokens"),
        (["Transformer", "Pooling"], {}, "pooling by nothing"),
        (["Transformer", "Pooling"], {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": True}, "pooling by"),
    ],
)
def test_sentence_transformers_that_do_something_else(
    modules: list[str], pooling: dict[str, Any], message: str, tmp_path: Path
) -> None:
    sentence_transformer(tmp_path, *modules, **pooling)
    (tmp_path / "CLIPModel").mkdir()
    (tmp_path / "CLIPModel" / CONFIG).write_bytes((tmp_path / CONFIG).read_bytes())
    (tmp_path / "CLIPModel" / WEIGHTS).write_bytes((tmp_path / WEIGHTS).read_bytes())
    with pytest.raises(UnsupportedError, match=message):
        load(tmp_path)


def test_modules_that_are_no_list(tmp_path: Path) -> None:
    sentence_transformer(tmp_path, "Transformer", "Pooling", pooling_mode="mean")
    for text in ("{}", "[]", '["Transformer"]', '[{"type": "Transformer"}]'):
        (tmp_path / "modules.json").write_text(text)
        with pytest.raises(InputError, match="modules.json should"):
            load(tmp_path)


def test_what_it_can_do_is_said_once() -> None:
    assert {*TASKS_OF_THE_ORACLE, "sentence-embedding"} == set(TASKS)
