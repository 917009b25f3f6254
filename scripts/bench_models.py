"""The workloads of `scripts/bench models` and `scripts/bench peers`: single operations, functions, blocks and models.

Models are graphs of bench_peers/graphs.py, which every system evaluates with its own operations; ours as a module of
torch. Only of language models ours runs what a user runs: a deployed `Decoder`, secret token ids to a secret token.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import numpy as np
import torch
from bench_cases import Arrays, Text, Workload
from bench_functions import absolute, functions
from bench_ops import linear
from bench_peers.graphs import NumpyOps, Ops, evaluate
from pretrained import language_model, sentence_encoder
from torch import nn
from torch.nn import functional

from mpcinfer.client.text import Tokenizer
from mpcinfer.models import rope
from mpcinfer.models.decoder import Decoder, DecoderConfig, loaded_decoder
from mpcinfer.models.encoder import Encoder, EncoderConfig
from mpcinfer.models.loaded import Loaded

FUNCTIONS = ("relu", "gelu", "silu", "exp", "reciprocal", "rsqrt", "softmax", "layernorm")
PROMPT = (
    "Paris is the capital and largest city of France. Berlin is the capital of Germany. Rome is the capital of Italy. "
    "Madrid is the capital of Spain. Lisbon is the capital of Portugal, and Vienna is the capital of Austria."
)
TOKENS, CONTEXT = 32, 512
LEAST_COSINE = 0.9999  # of a sentence's embedding, as in the demo
LOGITS = absolute(0.1)  # as the tests ask of SmolLM2


# --- graphs as modules ------------------------------------------------------------------------------------------------


class TorchOps(Ops):
    """What graphs are made of, as a user of torch writes it; weights are [out, in], as in nn.Linear."""

    mm, square, rsqrt, reshape = map(staticmethod, (torch.matmul, torch.square, torch.rsqrt, torch.reshape))
    transpose, gelu, silu = map(staticmethod, (torch.permute, functional.gelu, functional.silu))

    def linear(self, x: Any, w: Any, name: str) -> Any:
        """In one piece, so that the bias is added before rounding."""
        return functional.linear(x, w[f"{name}_w"], w.get(f"{name}_b"))

    def layernorm(self, x: Any, w: Any, name: str, eps: float) -> Any:
        """Whole."""
        return functional.layer_norm(x, x.shape[-1:], w[f"{name}_g"], w[f"{name}_b"], eps)

    def rmsnorm(self, x: Any, w: Any, name: str, eps: float) -> Any:
        """Whole."""
        return functional.rms_norm(x, x.shape[-1:], w[f"{name}_g"], eps)

    def attention(self, q: Any, k: Any, v: Any, mask: Any) -> Any:
        """Whole; what a mask hides is no part of it."""
        return functional.scaled_dot_product_attention(q, k, v, is_causal=mask is not None)

    def mean(self, x: Any) -> Any:
        """Over the last dimension, which stays."""
        return x.mean(-1, keepdim=True)

    def gelu_tanh(self, x: Any) -> Any:
        """The tanh form."""
        return functional.gelu(x, approximate="tanh")

    def take(self, x: Any, axis: int, start: int, stop: int) -> Any:
        """A slice."""
        return x.narrow(axis, start, stop - start)

    def concatenate(self, parts: list[Any], axis: int) -> Any:
        """Along an axis."""
        return torch.cat(parts, axis)


class Graph(nn.Module):
    """A graph whose weights are parameters."""

    def __init__(self, operation: str, arrays: Arrays, settings: dict[str, Any]) -> None:
        super().__init__()
        self.operation, self.settings = operation, settings
        for name, array in arrays.items():
            if name != "x":
                value = torch.from_numpy(np.ascontiguousarray(array.T if name.endswith("_w") else array))
                self.register_parameter(name, nn.Parameter(value.float(), requires_grad=False))

    def forward(self, x: torch.Tensor) -> Any:
        """What the graph makes of x."""
        return evaluate(self.operation, TorchOps(), {"x": x, **dict(self.named_parameters())}, self.settings)


class _Largest(nn.Module):
    """The largest of a row."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.amax(-1)


def graph(name: str, operation: str, arrays: Arrays, settings: dict[str, Any], **more: Any) -> Workload:
    """A graph on arrays; its reference is in float64."""
    wide = {key: np.asarray(value, np.float64) for key, value in arrays.items()}
    reference = np.asarray(evaluate(operation, NumpyOps(), wide, settings))
    model = None if "text" in more else Graph(operation, arrays, settings)
    return Workload(name, operation, arrays, model, reference, settings=settings, **more)


# --- models -----------------------------------------------------------------------------------------------------------


def gpt2_block(rows: int, tiny: bool = False) -> Workload:
    """A block of GPT-2 small with random weights on random hidden states."""
    width, heads, hidden = (16, 2, 32) if tiny else (768, 12, 3072)
    draw = np.random.default_rng(7).normal
    arrays = {
        "ln1_g": draw(1, 0.1, width),
        "ln1_b": draw(0, 0.02, width),
        "qkv_w": draw(0, 0.04, (width, 3 * width)),
        "qkv_b": draw(0, 0.02, 3 * width),
        "o_w": draw(0, 0.02, (width, width)),
        "o_b": draw(0, 0.02, width),
        "ln2_g": draw(1, 0.1, width),
        "ln2_b": draw(0, 0.02, width),
        "up_w": draw(0, 0.04, (width, hidden)),
        "up_b": draw(0, 0.02, hidden),
        "down_w": draw(0, 0.02, (hidden, width)),
        "down_b": draw(0, 0.02, width),
        "x": draw(0, 1, (rows, width)),
    }
    return graph(f"GPT-2 block, {rows} tokens", "gpt2", arrays, {"heads": heads})


def minilm(tiny: bool = False) -> Workload:
    """all-MiniLM-L6-v2 on the summed embeddings of a sentence of 32 tokens, to the mean of its hidden states."""
    if tiny:
        config = EncoderConfig(50, 16, 16, 2, 2, 32, "gelu", 1e-12)
        torch.manual_seed(1)
        return encoder("MiniLM-L6, 8 tokens", Encoder(config, nn.Identity()), list(range(8)), 2)
    loaded = sentence_encoder()
    assert loaded.tokenizer is not None and isinstance(loaded.module, Encoder)
    ids = Tokenizer.load(loaded.tokenizer, CONTEXT).ids(PROMPT).tolist()[:TOKENS]
    return encoder(f"MiniLM-L6, {TOKENS} tokens", loaded.module, ids, 12)


def bert_base() -> Workload:
    """BERT-base with random weights, 128 tokens."""
    torch.manual_seed(1)
    config = EncoderConfig(1000, 128, 768, 12, 12, 3072, "gelu", 1e-12)
    model = Encoder(config, nn.Identity()).requires_grad_(False)
    return encoder("BERT-base, 128 tokens", model, list(range(128)), 12, large=True)


def encoder(name: str, model: Encoder, ids: Sequence[int], heads: int, **more: Any) -> Workload:
    """An encoder from the sum of its embeddings on."""
    arrays = _norm("ln", model.norm)
    arrays["x"] = _array(model.words.weight[list(ids)] + model.positions[: len(ids)])
    for i, block in enumerate(model.blocks):
        layers = {"qkv": block.attention.qkv, "o": block.attention.out, "up": block.up, "down": block.down}
        for part, layer in layers.items():
            arrays |= {f"{i}_{part}_w": _array(layer.weight.T), f"{i}_{part}_b": _array(layer.bias)}
        arrays |= _norm(f"{i}_ln1", block.attention_norm) | _norm(f"{i}_ln2", block.norm)
    settings = {"heads": heads, "layers": len(model.blocks)}
    return graph(name, "bert", arrays, settings, least_cosine=LEAST_COSINE, **more)


def _array(tensor: torch.Tensor) -> np.ndarray[Any, Any]:
    return np.ascontiguousarray(tensor.detach().float().numpy())


def _norm(name: str, norm: nn.Module) -> Arrays:
    return {f"{name}_{'g' if key == 'weight' else 'b'}": _array(p) for key, p in norm.named_parameters()}


@cache
def smollm(tiny: bool = False) -> tuple[Loaded, tuple[int, ...]]:
    """SmolLM2-135M-Instruct and a prompt."""
    if tiny:
        torch.manual_seed(2)
        config = DecoderConfig(
            vocabulary=40, context=32, width=16, layers=2, heads=4, kv_heads=2, head_dim=4, hidden=24,
            activation="silu", eps=1e-5, rope=rope.plain(100.0, 4), norm="rms", gated=True, tied=True, scale=0.5,
            windows=(0, 0),
        )  # fmt: skip
        model = Decoder(config.checked()).eval().requires_grad_(False)
        return loaded_decoder(model, "tiny", None), tuple(range(3, 11))
    loaded = language_model(CONTEXT)
    assert loaded.vocabulary is not None
    return loaded, tuple(Tokenizer.of(loaded.vocabulary).ids(PROMPT).tolist()[:TOKENS])


def text(decode: bool, tiny: bool = False) -> Workload:
    """SmolLM2's step for the first token after a prompt, or the one that takes the prompt in.

    Peers get what a client of theirs could prepare: embeddings, and keys and values of what was seen, in private; ours
    looks secret ids up, and chooses the token.
    """
    loaded, ids = smollm(tiny)
    model, prompt = loaded.module, list(ids)
    assert isinstance(model, Decoder) and model.config.rope is not None
    config, table = model.config, _array(model.embedding.weight)
    half = config.head_dim // 2
    settings = {
        "heads": config.heads,
        "kv_heads": config.kv_heads,
        "layers": config.layers,
        "theta": float(model.config.rope.frequencies[1] ** -half),
        "eps": config.eps,
    }
    arrays = {"x": table[prompt], "head_w": table.T.copy()} | _norm("ln", model.norm)
    for i, block in enumerate(model.blocks):
        attention, mlp = block.attention, block.mlp
        layers = {"q": attention.q, "k": attention.k, "v": attention.v, "o": attention.out}
        layers |= {"gate": mlp.gate, "up": mlp.up, "down": mlp.down}
        arrays |= {f"{i}_{part}_w": _array(layer.weight.T) for part, layer in layers.items()}
        arrays |= _norm(f"{i}_ln1", block.attention_norm) | _norm(f"{i}_ln2", block.norm)
    if decode:
        with torch.no_grad():
            logits, *caches = model(torch.tensor([prompt]), *model.empty_caches())
        arrays["x"] = table[[int(logits.argmax())]]
        for i in range(config.layers):
            arrays |= {f"keys{i}": _array(caches[2 * i][0]), f"values{i}": _array(caches[2 * i + 1][0])}
        settings["seen"] = len(prompt)
    what = f"a token after {len(prompt)}" if decode else f"a prompt of {len(prompt)}"
    measured = Text(loaded, prompt, decode)
    return graph(f"SmolLM2-135M, {what}", "llama", arrays, settings, tolerance=LOGITS, text=measured, large=not tiny)


# --- the list ---------------------------------------------------------------------------------------------------------


def _function(name: str, tiny: bool) -> Workload:
    """A function on its ordinary points."""
    found = next(f for f in functions(tiny) if f.operation == name)
    arrays, reference = found.arrays("ordinary"), found.reference("ordinary")
    return Workload(found.name, name, arrays, found.model, reference, tolerance=found.tolerance)


def _largest(name: str, tiny: bool) -> Workload:
    x = np.random.default_rng(1).normal(0, 4, (1, 100 if tiny else 49_152))
    said = f"{name} of {x.size:,}"
    if name == "max":
        return Workload(said, name, {"x": x}, _Largest(), x.max(-1))
    return Workload(said, name, {"x": x}, nn.Identity(), x.argmax(-1), reveal="argmax")


_PEERS: dict[str, Callable[[bool], Workload]] = {
    "matmul16": lambda tiny: linear(*((4, 32, 16) if tiny else (16, 768, 3072))),
    "matmul128": lambda tiny: linear(*((8, 16, 16) if tiny else (128, 768, 768))),
    **{name: lambda tiny, name=name: _function(name, tiny) for name in FUNCTIONS},  # type: ignore[misc]
    "max": lambda tiny: _largest("max", tiny),
    "argmax": lambda tiny: _largest("argmax", tiny),
}
_MODELS: dict[str, Callable[[bool], Workload]] = {
    "gpt2-16": lambda tiny: gpt2_block(4 if tiny else 16, tiny),
    "gpt2-128": lambda tiny: gpt2_block(8 if tiny else 128, tiny),
    "minilm": minilm,
}
_TEXTS: dict[str, Callable[[bool], Workload]] = {
    "token": lambda tiny: text(True, tiny),
    "prompt": lambda tiny: text(False, tiny),
}
_BERT: dict[str, Callable[[bool], Workload]] = {"bert": lambda tiny: minilm(True) if tiny else bert_base()}

# what each command can measure, and what it does unless told otherwise
WORKLOADS = {"peers": _PEERS | _MODELS | _TEXTS | _BERT, "models": _MODELS | _BERT}
DEFAULT = {"peers": [*_PEERS, *_MODELS, *_TEXTS], "models": [*_MODELS, *_BERT]}
