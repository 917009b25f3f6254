"""Small decoders as the library transformers makes, writes and evaluates them: what ours are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from mpcinfer.models.decoder import Decoder
from tests.models.oracle import transformers

VOCABULARY, POSITIONS = 60, 24
_ROPED = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2} | {
    "intermediate_size": 24,
    "max_position_embeddings": POSITIONS,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", _ROPED),
    "mistral": ("Mistral", _ROPED | {"sliding_window": 5, "head_dim": 6}),
    "qwen2": ("Qwen2", _ROPED),
    "qwen3": ("Qwen3", _ROPED | {"head_dim": 8}),
    "gemma": ("Gemma", _ROPED | {"head_dim": 8}),
    "gpt2": ("GPT2", {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": POSITIONS}),
    "gpt_neo": (
        "GPTNeo",
        {"hidden_size": 16, "num_layers": 2, "num_heads": 4, "max_position_embeddings": POSITIONS, "window_size": 4}
        | {"attention_types": [[["global", "local"], 1]]},
    ),
}


def make(family: str, directory: Path, **settings: Any) -> torch.nn.Module:
    """A model with random parameters, none of them zero or one, written to `directory`."""
    name, sizes = FAMILIES[family]
    tokens = {"vocab_size": VOCABULARY, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    config = getattr(transformers, f"{name}Config")(**tokens | sizes | {"attn_implementation": "eager"} | settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}{'LMHeadModel' if family == 'gpt2' else 'ForCausalLM'}")(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.5 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


def ids(length: int) -> torch.Tensor:
    """Ids of tokens, [1, length]."""
    return torch.randint(3, VOCABULARY, (1, length))


def expected(theirs: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """The oracle's logits [1, vocabulary] of the last position."""
    with torch.no_grad():
        logits: torch.Tensor = theirs(tokens, attention_mask=torch.ones_like(tokens), use_cache=False).logits[:, -1]
    return logits


def in_chunks(model: Decoder, tokens: torch.Tensor, *lengths: int) -> tuple[torch.Tensor, ...]:
    """What `model` returns for the last of several chunks, each with the cache of those before."""
    results: tuple[torch.Tensor, ...] = (torch.empty(0), *model.empty_caches())
    for chunk in tokens.split(lengths, 1):
        results = model(chunk, *results[1:])
    return results
