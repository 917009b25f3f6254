"""A Hugging Face directory (config.json, safetensors, tokenizer.json) to a module: encoders and their task heads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mpcinfer.errors import InputError, UnsupportedError
from mpcinfer.models.checkpoint import Tensors, read_json, read_tensors
from mpcinfer.models.decoder_families import FAMILIES as DECODERS
from mpcinfer.models.encoder import (
    Encoder,
    EncoderConfig,
    SentenceEmbedding,
    SequenceClassifier,
    SpanFinder,
    TokenClassifier,
    WordPredictor,
)
from mpcinfer.models.families import ACTIVATIONS, FAMILIES, UNUSED, Family
from mpcinfer.models.loaded import InputSpec, Loaded, Sizes

# what follows the family in the name of an architecture
_TASKS = {
    "Model": "feature-extraction",
    "ForSequenceClassification": "text-classification",
    "ForTokenClassification": "token-classification",
    "ForQuestionAnswering": "question-answering",
    "ForMaskedLM": "fill-mask",
    "ForPreTraining": "fill-mask",
}
TASKS = (*dict.fromkeys(_TASKS.values()), "sentence-embedding")

_Config = dict[str, Any]


def load(directory: Path, task: str | None = None) -> Loaded:
    """The encoder in `directory` with the head for `task`, one of TASKS, as float32 in eval mode.

    By default the task is what the directory says the model is for: sentence embedding where it has the modules.json
    of sentence-transformers, else that of config.json's architecture. A sentence embedding is pooled and normalised as
    these files say, and without them the mean of all tokens, of length 1. The module takes the ids of one sequence, or
    of several of one length; all tokens are of type 0 and none is padding. What it returns is said in `models.encoder`.
    Raises InputError for a directory that is incomplete or contradicts itself, UnsupportedError for other models.
    """
    stages = _stages(directory)
    body = directory / stages[0][1] if stages else directory
    config = read_json(body / "config.json", dict)
    kind, family = _family(config)
    task = task or ("sentence-embedding" if stages else _task(config, kind))
    if task not in TASKS:
        raise InputError(f"{task!r} is not a task: choose one of {', '.join(TASKS)}")
    skipped = _whole(config, "pad_token_id", least=0) + 1 if family.offset_positions else 0
    sizes = _sizes(config, family, skipped)
    tensors = Tensors(read_tensors(body), (family.prefix, "model."))
    with torch.device("meta"):
        head = _embedding(directory, stages) if task == "sentence-embedding" else _head(task, sizes, family, tensors)
        model = Encoder(sizes, head)
    _fill(model, task, config, family, tensors, skipped)
    tokenizers = [path for path in (body / "tokenizer.json", directory / "tokenizer.json") if path.is_file()]
    return Loaded(
        module=model.eval().requires_grad_(False),
        inputs=(InputSpec("ids", "int", (Sizes(1, sizes.positions),)),),
        kind=f"Hugging Face {kind}, {task}",
        tokenizer=tokenizers[0] if tokenizers else None,
        labels=_labels(config, head),
    )


def _stages(directory: Path) -> list[tuple[str, str]]:
    """The type and the sub-directory of each of sentence-transformers' modules; none if this is no such directory."""
    path = directory / "modules.json"
    if not path.exists():
        return []
    stages = read_json(path, list)
    if not stages or not all(isinstance(s, dict) and {"type", "path"} <= set(s) for s in stages):
        raise InputError(f"{path} should list modules, each with its type and path")
    return [(str(stage["type"]).rpartition(".")[2], str(stage["path"])) for stage in stages]


def _family(config: _Config) -> tuple[str, Family]:
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        supported = ", ".join(sorted({*FAMILIES, *DECODERS}))
        raise UnsupportedError(f"model_type {kind!r} has no importer. Supported: {supported}")
    positions = config.get("position_embedding_type")
    if positions not in (None, "absolute"):
        raise UnsupportedError(f"position_embedding_type {positions!r} is not supported, only 'absolute'")
    for setting in ("is_decoder", "add_cross_attention"):
        if config.get(setting):
            raise UnsupportedError(f"{setting} is set: this is a decoder, only encoders are supported")
    return kind, FAMILIES[kind]


def _task(config: _Config, kind: str) -> str:
    name = next(iter(config.get("architectures") or []), None)
    if not isinstance(name, str):
        raise InputError(f"config.json names no architecture: say which task, one of {', '.join(TASKS)}")
    family = kind.replace("-", "")
    task = _TASKS.get(name[len(family) :]) if name.lower().startswith(family) else None
    if task is None:
        known = ", ".join(f"...{end}" for end in _TASKS)
        raise UnsupportedError(
            f"architecture {name} is not supported, only {known}; or choose a task it can do as well"
        )
    return task


def _sizes(config: _Config, family: Family, skipped: int) -> EncoderConfig:
    activation = config.get(family.activation)
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        raise UnsupportedError(f"activation {activation!r} is not supported, only {', '.join(sorted(ACTIVATIONS))}")
    eps = config.get("layer_norm_eps") if family.eps is None else family.eps
    if not isinstance(eps, float) or eps < 0:
        raise InputError("config.json should set layer_norm_eps to a small positive number")
    found = {ours: _whole(config, theirs) for ours, theirs in family.sizes.items()}
    found["positions"] -= skipped
    sizes = EncoderConfig(activation=ACTIVATIONS[activation], eps=eps, **found)
    if sizes.width % sizes.heads or sizes.positions < 1:
        raise InputError(
            f"config.json contradicts itself: width {sizes.width}, {sizes.heads} heads, {sizes.positions} positions"
        )
    return sizes


def _whole(config: _Config, name: str, least: int = 1) -> int:
    value = config.get(name)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"config.json should set {name} to a whole number, {least} or more")
    return value


def _embedding(directory: Path, stages: list[tuple[str, str]]) -> SentenceEmbedding:
    if not stages:
        return SentenceEmbedding("mean", normalised=True)
    types = [kind for kind, _ in stages]
    if types not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
        raise UnsupportedError(
            f"modules.json lists {', '.join(types)}: only Transformer, Pooling, Normalize is supported"
        )
    config = read_json(directory / stages[1][1] / "config.json", dict)
    old = [name.removeprefix("pooling_mode_") for name, on in config.items() if name.startswith("pooling_mode_") and on]
    modes = {"mean_tokens": "mean", "mean": "mean", "cls_token": "first", "cls": "first"}
    chosen = [config["pooling_mode"]] if "pooling_mode" in config else old
    if len(chosen) != 1 or chosen[0] not in modes:
        raise UnsupportedError(
            f"pooling by {', '.join(map(str, chosen)) or 'nothing'} is not supported, only mean or cls"
        )
    return SentenceEmbedding(modes[chosen[0]], normalised="Normalize" in types)


def _head(task: str, sizes: EncoderConfig, family: Family, tensors: Tensors) -> nn.Module:
    if task == "feature-extraction":
        return nn.Identity()
    if task == "fill-mask":
        activation = family.word_activation or sizes.activation
        return WordPredictor(sizes.width, sizes.vocabulary, activation, sizes.eps)
    if task == "question-answering":
        return SpanFinder(sizes.width)
    classes = tensors.rows(family.heads[task]["output"] + ".weight")
    if task == "token-classification":
        return TokenClassifier(sizes.width, classes)
    return SequenceClassifier(sizes.width, classes, family.classifier_activation)


def _fill(model: Encoder, task: str, config: _Config, family: Family, tensors: Tensors, skipped: int) -> None:
    """Give the module the checkpoint's tensors, all of them."""
    length, width = model.positions.shape
    table = tensors.take("embeddings.position_embeddings.weight", (skipped + length, width))[skipped:]
    if family.token_types:
        types = _whole(config, "type_vocab_size")
        table = table + tensors.take("embeddings.token_type_embeddings.weight", (types, width))[0]
    state = {"positions": table}
    predictor = model.head if isinstance(model.head, WordPredictor) else None
    tied = predictor is not None and config.get("tie_word_embeddings", True)
    for name, empty in model.state_dict().items():
        if name in state:
            continue
        if tied and name == "head.output.weight":
            state[name] = state["words.weight"]
            continue
        theirs = _their_names(name, task, family)
        if predictor is not None and name == "head.output.bias" and theirs[0] not in tensors:
            theirs = [family.word_bias]
        rows = empty.shape[0] // len(theirs)
        state[name] = torch.cat([tensors.take(each, (rows, *empty.shape[1:])) for each in theirs])
    tensors.check(UNUSED)
    model.load_state_dict(state, assign=True)
    if tied and predictor is not None:
        predictor.output.weight = model.words.weight  # one parameter, so that it is one secret


def _their_names(name: str, task: str, family: Family) -> list[str]:
    """What the checkpoint calls the tensor that is `name` in the module's state."""
    module, _, role = name.rpartition(".")
    if module.startswith("head."):
        return [f"{family.heads[task][module.removeprefix('head.')]}.{role}"]
    layer = "".join(re.findall(r"\d+", module))
    return [f"{each}.{role}".format(layer) for each in family.names[re.sub(r"\d+", "{}", module)]]


def _labels(config: _Config, head: nn.Module) -> tuple[str, ...]:
    """The names of the classes, if config.json has any."""
    names = config.get("id2label")
    if not isinstance(head, SequenceClassifier | TokenClassifier) or not names:
        return ()
    if not isinstance(names, dict) or set(names) != {str(i) for i in range(head.output.out_features)}:
        raise InputError(f"id2label in config.json should name the classes 0 to {head.output.out_features - 1}")
    return tuple(str(names[str(i)]) for i in range(len(names)))
