"""GGUF files, written here as the converter of llama.cpp writes them, against transformers; and every file refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType

from mpcinfer.errors import InputError, UnsupportedError
from mpcinfer.models import huggingface_decoder
from mpcinfer.models.decoder import Decoder
from mpcinfer.models.load import load
from tests.models import decoders, ggufs

WIDE = {"hidden_size": 32, "intermediate_size": 64}  # quantised rows are multiples of 32
SIZES: dict[str, dict[str, Any]] = {name: WIDE for name in ("llama", "qwen2", "qwen3", "gemma")} | {
    "gpt2": {"n_embd": 32}
}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0} | {
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 6}


def models(directory: Path, family: str = "llama", **settings: Any) -> tuple[torch.nn.Module, Decoder]:
    """A model of transformers and ours with its parameters."""
    theirs = decoders.make(family, directory, **SIZES[family] | settings)
    ours = huggingface_decoder.load(directory).module
    assert isinstance(ours, Decoder)
    return theirs, ours


def read(path: Path, context: int | None = None) -> Decoder:
    """The decoder in a file."""
    model = load(path, context=context).module
    assert isinstance(model, Decoder) and not model.training
    assert all(p.dtype == torch.float32 and not p.requires_grad for p in model.parameters())
    return model


def assert_same(model: Decoder, theirs: torch.nn.Module) -> None:
    """Ours is theirs, without a cache and with one that grew."""
    tokens = decoders.ids(20)
    expected = decoders.expected(theirs, tokens)
    assert (model(tokens, *model.empty_caches())[0] - expected).abs().max() <= 1e-4
    assert (decoders.in_chunks(model, tokens, 7, 1, 12)[0] - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("family", SIZES)
def test_every_architecture_equals_transformers(family: str, tmp_path: Path) -> None:
    theirs, ours = models(tmp_path, family)
    written = ggufs.write(tmp_path / "m", family, ours)
    if family == "llama":  # or else this test could not tell whether rows are put back into order
        assert not written["blk.0.attn_q.weight"].equal(ours.state_dict()["blocks.0.attention.q.weight"])
    loaded = load(tmp_path / "m")
    assert (loaded.kind, loaded.context, loaded.vocabulary) == (f"GGUF {family}", decoders.POSITIONS, None)
    assert_same(read(tmp_path / "m"), theirs)
    assert read(tmp_path / "m", context=7).config.context == 7


@pytest.mark.parametrize("kind", [ggufs.F16, ggufs.Q8_0, GGMLQuantizationType.Q4_1, GGMLQuantizationType.BF16])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_quantised_weights(family: str, kind: GGMLQuantizationType, tmp_path: Path) -> None:
    _, ours = models(tmp_path, family)
    ggufs.write(tmp_path / "m", family, ours, kind)
    found = read(tmp_path / "m").state_dict()
    assert set(found) == set(ours.state_dict())
    for name, tensor in ours.state_dict().items():
        assert found[name].equal(ggufs.rounded(tensor, kind) if tensor.dim() > 1 else tensor)


def test_heads_tied_untied_and_repeated(tmp_path: Path) -> None:
    for tied in (True, False):
        theirs, ours = models(tmp_path, tie_word_embeddings=tied)
        ggufs.write(tmp_path / "m", "llama", ours)
        model = read(tmp_path / "m")
        assert ("head.weight" not in model.state_dict()) == model.config.tied == tied
        assert_same(model, theirs)
    with torch.no_grad():
        ours.head.weight.copy_(ours.embedding.weight)
    ggufs.write(tmp_path / "m", "llama", ours)
    assert read(tmp_path / "m").config.tied


def test_biases_are_in_the_order_of_their_rows(tmp_path: Path) -> None:
    theirs, ours = models(tmp_path, attention_bias=True)
    ggufs.write(tmp_path / "m", "llama", ours)
    assert_same(read(tmp_path / "m"), theirs)


@pytest.mark.parametrize(
    ("parameters", "metadata"),
    [
        ({"rope_type": "linear", "factor": 2.0}, {"rope.scaling.type": "linear", "rope.scaling.factor": 2.0}),
        ({"rope_type": "linear", "factor": 2.0}, {"rope.scale_linear": 2.0}),
        (
            YARN,
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 6},
        ),
        (
            YARN | {"attention_factor": 1.5},
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 6}
            | {"rope.scaling.attn_factor": 1.3173576},  # that is 1.5 / (1 + ln(4) / 10)
        ),
        ({"rope_theta": 77.0}, {"rope.freq_base": 77.0, "rope.scaling.type": "none"}),
    ],
)
def test_rotary_embeddings(parameters: dict[str, Any], metadata: dict[str, Any], tmp_path: Path) -> None:
    theirs, ours = models(tmp_path, rope_parameters={"rope_theta": 10000.0, "rope_type": "default"} | parameters)
    ggufs.write(tmp_path / "m", "llama", ours, **metadata)
    assert_same(read(tmp_path / "m"), theirs)


def test_factors_of_frequencies_are_a_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = models(tmp_path, rope_parameters=LLAMA3)
    assert ours.config.rope is not None
    plain = [10000.0 ** (-i / 4) for i in range(4)]
    factors = torch.tensor([p / speed for p, speed in zip(plain, ours.config.rope.frequencies, strict=True)])
    with_factors = ggufs.tensors("llama", ours) | {"rope_freqs.weight": factors}
    monkeypatch.setattr(ggufs, "tensors", lambda *_: with_factors)
    ggufs.write(tmp_path / "m", "llama", ours)
    assert_same(read(tmp_path / "m"), theirs)
    with_factors["rope_freqs.weight"] = torch.ones(3)
    ggufs.write(tmp_path / "m", "llama", ours)
    with pytest.raises(InputError, match="rope_freqs.weight should hold one factor"):
        load(tmp_path / "m")


@pytest.mark.parametrize(
    ("architecture", "metadata", "message"),
    [
        ("phi3", {}, "architecture 'phi3' has no importer. Supported: gemma, gpt2, llama, qwen2, qwen3"),
        ("llama", {"expert_count": 8}, "expert_count is set: a mixture of experts"),
        ("llama", {"final_logit_softcapping": 30.0}, "soft capping of logits"),
        ("llama", {"attention.head_count_kv": [2, 4]}, "head_count_kv differs from layer to layer"),
        ("llama", {"attention.value_length": 4}, "keys and values of different lengths"),
        ("llama", {"rope.dimension_count": 4}, "a part of each head"),
        ("llama", {"rope.scaling.type": "longrope"}, "scaled by 'longrope'"),
        ("llama", {"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": ["a"]}, "'bert' is not supported"),
    ],
)
def test_models_that_are_something_else(
    architecture: str, metadata: dict[str, Any], message: str, tmp_path: Path
) -> None:
    _, ours = models(tmp_path)
    ggufs.write(tmp_path / "m", architecture, ours, **metadata)
    with pytest.raises(UnsupportedError, match=message):
        load(tmp_path / "m")


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"block_count": None}, "lacks llama.block_count"),
        ({"block_count": "two"}, "llama.block_count in the GGUF file's metadata is no int"),
        ({"embedding_length": 0}, "embedding_length in the GGUF file's metadata should be 1 or more"),
        ({"block_count": 3}, "the checkpoint lacks blk.2"),
        ({"feed_forward_length": 65}, r"shape \[64, 32\] where the file's metadata demands \[65, 32\]"),
        ({"attention.head_count": 3}, "contradict each other: 3 heads, 2 of keys"),
        ({"rope.freq_base": float("nan")}, "freq_base in the GGUF file's metadata is no float"),
    ],
)
def test_metadata_that_does_not_fit(metadata: dict[str, Any], message: str, tmp_path: Path) -> None:
    _, ours = models(tmp_path)
    ggufs.write(tmp_path / "m", "llama", ours, **metadata)
    with pytest.raises(InputError, match=message):
        load(tmp_path / "m")


@pytest.mark.parametrize(
    "damage",
    [
        lambda b: b[:-5000],
        lambda b: b[:300],
        lambda b: b[:20],
        lambda b: b[:4],
        lambda b: b[:4] + b"\x09" + b[5:],
        lambda b: b[:24] + b"\xff" * 8 + b[32:],
        lambda b: b.replace(b"token_embd", b"token_gone"),
        lambda b: b.replace(b"general.architecture", b"general.architectura"),
    ],
)
def test_damaged_files(damage: Callable[[bytes], bytes], tmp_path: Path) -> None:
    _, ours = models(tmp_path)
    path = tmp_path / "m"
    ggufs.write(path, "llama", ours)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(InputError, match="GGUF|lacks the table of embeddings"):
        load(path)


def test_a_quantisation_that_the_library_cannot_undo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def impossible(*_: Any) -> None:
        raise NotImplementedError

    _, ours = models(tmp_path)
    ggufs.write(tmp_path / "m", "llama", ours)
    monkeypatch.setattr(gguf, "dequantize", impossible)
    with pytest.raises(UnsupportedError, match="token_embd.weight is quantised as F32, which is not supported"):
        load(tmp_path / "m")
