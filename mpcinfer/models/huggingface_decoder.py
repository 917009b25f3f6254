"""A Hugging Face directory (config.json, safetensors, tokenizer.json) to a Decoder and its vocabulary."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from mpcinfer.errors import InputError, UnsupportedError
from mpcinfer.models import rope
from mpcinfer.models.checkpoint import read_json, read_tensors
from mpcinfer.models.decoder import DecoderConfig, loaded_decoder
from mpcinfer.models.decoder_families import ACCEPTED, FAMILIES, Family
from mpcinfer.models.decoder_fill import chosen_context, filled
from mpcinfer.models.families import ACTIVATIONS
from mpcinfer.models.huggingface_vocabulary import vocabulary
from mpcinfer.models.loaded import Loaded
from mpcinfer.models.rope import Rope

TASK = "text-generation"

_Config = dict[str, Any]


def load(directory: Path, task: str | None = None, context: int | None = None) -> Loaded:
    """The decoder in `directory`, of one of the types in FAMILIES, as float32 in eval mode, for `context` positions.

    Without one it takes what the model was made for, 2048 at most. Raises InputError for a directory that is
    incomplete or contradicts itself, UnsupportedError for settings that aren't supported.
    """
    if task not in (None, TASK):
        raise InputError(f"{directory} holds a decoder, whose task is {TASK}, not {task!r}")
    config = read_json(directory / "config.json", dict)
    kind = config["model_type"]
    family = FAMILIES[kind]
    for name, values in ACCEPTED.items():
        if config.get(name) not in values:
            raise UnsupportedError(f"{name} is set in config.json, which is not supported for decoders")
    sizes = _sizes(config, family, context)
    model = filled(sizes, read_tensors(directory), family.layout, "config.json")
    return loaded_decoder(model, f"Hugging Face {kind}, {TASK}", vocabulary(directory, config))


def _sizes(config: _Config, family: Family, asked: int | None) -> DecoderConfig:
    given = {ours: theirs for ours, theirs in family.sizes.items() if config.get(theirs) is not None}
    found: dict[str, Any] = {ours: _whole(config, theirs) for ours, theirs in given.items()}
    for ours in ("vocabulary", "context", "width", "layers", "heads"):
        if ours not in found:
            raise InputError(f"config.json should set {family.sizes[ours]}")
    width, longest = found["width"], found["context"]
    found = {"kv_heads": found["heads"], "head_dim": width // found["heads"], "hidden": 4 * width} | found
    found["context"] = chosen_context(asked, longest)
    name = config.get(family.activation)
    activation = family.activations.get(str(name)) or ACTIVATIONS.get(str(name))
    if activation is None:
        raise UnsupportedError(f"activation {name!r} is not supported, only {', '.join(sorted(ACTIVATIONS))}")
    return DecoderConfig(
        **found,
        activation=activation,
        eps=_number(config, family.eps),
        rope=None if family.classic else _rope(config, found["head_dim"], longest),
        norm="layer" if family.classic else "rms",
        gated=not family.classic,
        tied=bool(config.get("tie_word_embeddings", family.tied)),
        scale=found["head_dim"] ** -0.5 if family.scaled else 1.0,
        windows=_windows(config, family, found["layers"], found["context"]),
        embedding_scale=math.sqrt(width) if family.enlarged else 1.0,
    ).checked()


def _windows(config: _Config, family: Family, layers: int, context: int) -> tuple[int, ...]:
    """How far each layer looks back; a window that no text is longer than is none."""
    if config.get("attention_types") is not None:  # gpt_neo
        try:
            kinds = [kind for group, times in config["attention_types"] for _ in range(times) for kind in group]
        except (TypeError, ValueError) as error:
            raise InputError("attention_types in config.json should list pairs of types and how often") from error
        window = _whole(config, "window_size")
    elif family.windowed or config.get("use_sliding_window"):
        if config.get("sliding_window") is None:
            return (0,) * layers
        first = 0 if family.windowed else config.get("max_window_layers") or 0
        given = config.get("layer_types") if not family.windowed else None
        kinds = list(given or ["sliding_attention" if i >= first else "full_attention" for i in range(layers)])
        window = _whole(config, "sliding_window")
    else:
        return (0,) * layers
    meant = {"global": 0, "full_attention": 0, "local": window, "sliding_attention": window}
    unknown = sorted({str(kind) for kind in kinds} - set(meant))
    if unknown:
        raise UnsupportedError(f"layers of type {', '.join(unknown)} are not supported")
    if len(kinds) != layers:
        raise InputError(f"config.json describes {len(kinds)} layers of {layers}")
    return tuple(meant[kind] if meant[kind] < context else 0 for kind in kinds)


def _rope(config: _Config, head_dim: int, longest: int) -> Rope:
    """As rope_parameters says, or what older files say in its place."""
    settings = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if not isinstance(settings, dict) or any(isinstance(value, dict) for value in settings.values()):
        raise UnsupportedError("rotary embeddings that differ from layer to layer are not supported")
    settings = dict(settings)
    settings.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if settings.get("partial_rotary_factor") not in (None, 1.0):
        raise UnsupportedError("partial_rotary_factor is set in config.json, which is not supported for decoders")
    kind = settings.get("rope_type", settings.get("type", "default"))
    theta = _number(settings, "rope_theta")
    if kind == "default":
        return rope.plain(theta, head_dim)
    if kind == "linear":
        return rope.linear(theta, head_dim, _number(settings, "factor"))
    given = "original_max_position_embeddings"
    original = _whole(settings, given) if settings.get(given) is not None else longest
    if kind == "llama3":
        low, high = _number(settings, "low_freq_factor"), _number(settings, "high_freq_factor")
        return rope.llama3(theta, head_dim, _number(settings, "factor"), low, high, original)
    if kind == "yarn":
        factor = _number(settings, "factor") if settings.get("factor") is not None else longest / original
        return rope.yarn(
            theta,
            head_dim,
            factor,
            original,
            magnitude=_magnitude(settings, factor),
            beta_fast=_number({"beta_fast": 32.0} | settings, "beta_fast"),
            beta_slow=_number({"beta_slow": 1.0} | settings, "beta_slow"),
            truncate=bool(settings.get("truncate", True)),
        )
    raise UnsupportedError(f"rotary embeddings of type {kind!r}: only default, linear, llama3 and yarn are supported")


def _magnitude(settings: _Config, factor: float) -> float | None:
    """YaRN's, where it isn't what follows from the factor alone."""
    if settings.get("attention_factor") is not None:
        return _number(settings, "attention_factor")
    if settings.get("mscale") and settings.get("mscale_all_dim") and factor > 1:
        one, all_dims = (1 + 0.1 * _number(settings, x) * math.log(factor) for x in ("mscale", "mscale_all_dim"))
        return one / all_dims
    return None


def _whole(config: _Config, name: str) -> int:
    value = config.get(name)
    if type(value) is not int or value < 1:
        raise InputError(f"config.json should set {name} to a whole number, 1 or more")
    return value


def _number(config: _Config, name: str) -> float:
    value = config.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InputError(f"config.json should set {name} to a positive number")
    return float(value)
