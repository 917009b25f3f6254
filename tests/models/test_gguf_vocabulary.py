"""Tokenizers out of GGUF metadata: what they make of texts is what the definitions of their kinds say."""

from __future__ import annotations

import json
from typing import Any

import pytest
from tokenizers import Tokenizer, pre_tokenizers, trainers
from tokenizers.models import BPE

from mpcinfer.errors import InputError, UnsupportedError
from mpcinfer.models.gguf import Metadata
from mpcinfer.models.gguf_vocabulary import vocabulary
from mpcinfer.models.vocabulary import Vocabulary

TEXT = "It's the naïve café's 1234567 cats,  and\n\n\tI'LL see (漢字 🙂) 12 x<|end|>y <think>z "
SPECIAL = ("<|start|>", "<|end|>")
USERS = ("<think>",)
NONE = 0xFFFFFFFF  # instead of an id
NORMAL, UNKNOWN, CONTROL, USER, BYTE = 1, 2, 3, 4, 6

# how the library's own pieces cut words, for the kinds that they can express
CUTS: dict[str, list[Any]] = {
    "gpt-2": [pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "smollm": [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
}


@pytest.fixture(scope="module")
def byte_level() -> dict[str, Any]:
    """The metadata of a byte-level tokenizer that was trained on one text."""
    library = Tokenizer(BPE())
    library.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    library.train_from_iterator([TEXT] * 3, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet))
    model = json.loads(library.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    return pairs(
        tokens=[*SPECIAL, *USERS, *tokens],
        token_type=[CONTROL] * len(SPECIAL) + [USER] * len(USERS) + [NORMAL] * len(tokens),
        merges=[" ".join(merge) for merge in model["merges"]],
        model="gpt2",
        bos_token_id=0,
        eos_token_id=1,
    )


def pairs(**settings: Any) -> dict[str, Any]:
    """Metadata that speaks of the tokenizer."""
    return {f"tokenizer.ggml.{key}": value for key, value in settings.items() if value is not None}


def made(metadata: dict[str, Any], **settings: Any) -> Vocabulary:
    """The vocabulary of a model that embeds a thousand tokens."""
    found = vocabulary(Metadata({"general.architecture": "llama"} | metadata | pairs(**settings)), 1000)
    assert found is not None
    return found


def library(metadata: dict[str, Any], **settings: Any) -> Tokenizer:
    """Its tokenizer."""
    return Tokenizer.from_str(made(metadata, **settings).tokenizer)


@pytest.mark.parametrize("name", ["gpt-2", "smollm", "llama-bpe", "qwen2", "default", "llama3", "phi-2"])
def test_texts_come_back(byte_level: dict[str, Any], name: str) -> None:
    tokenizer = library(byte_level, pre=name)
    ids = tokenizer.encode(TEXT, add_special_tokens=False).ids
    assert tokenizer.decode(ids, skip_special_tokens=False) == TEXT
    assert tokenizer.decode(ids) == TEXT.replace("<|end|>", "")
    assert {1, 2} <= set(ids)


@pytest.mark.parametrize("name", CUTS)
def test_words_are_cut_as_the_library_cuts_them(byte_level: dict[str, Any], name: str) -> None:
    tokenizer = library(byte_level, pre=name)
    theirs = pre_tokenizers.Sequence(CUTS[name])
    for text in (TEXT, "a  b   c", " 1a 22b333", "don't I'll WE'LL x's", "\n \n\n  \t."):
        assert tokenizer.pre_tokenizer is not None
        assert tokenizer.pre_tokenizer.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("gpt-2", ["I", "'", "LL", " see", " 12345", "!", "\n\n"]),
        ("smollm", ["I", "'", "LL", " see", " ", "1", "2", "3", "4", "5", "!", "\n\n"]),
        ("llama-bpe", ["I", "'LL", " see", " ", "123", "45", "!\n\n"]),
        ("qwen2", ["I", "'LL", " see", " ", "1", "2", "3", "4", "5", "!\n\n"]),
        ("default", ["I", "'", "LL", " see", " ", "123", "45", "!", "\n\n"]),
    ],
)
def test_words(byte_level: dict[str, Any], name: str, words: list[str]) -> None:
    tokenizer = library(byte_level, pre=name)
    assert tokenizer.pre_tokenizer is not None
    found = tokenizer.pre_tokenizer.pre_tokenize_str("I'LL see 12345!\n\n")
    assert [word.replace("Ġ", " ").replace("Ċ", "\n") for word, _ in found] == words


def test_what_else_is_said(byte_level: dict[str, Any]) -> None:
    found = made(byte_level | {"tokenizer.chat_template": "{{ messages }}"}, pre="gpt-2")
    assert (found.template, found.bos, found.eos, found.stop) == ("{{ messages }}", "<|start|>", "<|end|>", (1,))
    assert made(byte_level, eot_token_id=0, eom_token_id=NONE).stop == (0, 1)
    bare = made(byte_level, bos_token_id=NONE, eos_token_id=NONE)
    assert (bare.template, bare.bos, bare.eos, bare.stop) == ("", "", "", (1,))  # whose name says what it is
    assert vocabulary(Metadata({"general.architecture": "llama"}), 1000) is None


@pytest.mark.parametrize(
    ("settings", "around"),
    [
        ({"pre": "gpt-2"}, ([], [])),
        ({"pre": "llama-bpe"}, ([0], [])),
        ({"pre": "llama-bpe", "add_bos_token": False}, ([], [])),
        ({"pre": "qwen2", "add_bos_token": True, "add_eos_token": True}, ([0], [1])),
        ({"pre": "qwen2", "add_bos_token": True, "bos_token_id": NONE}, ([], [])),
    ],
)
def test_what_goes_around_a_text(
    byte_level: dict[str, Any], settings: dict[str, Any], around: tuple[list[int], list[int]]
) -> None:
    tokenizer = library(byte_level, **settings)
    bare = tokenizer.encode("the cats", add_special_tokens=False).ids
    assert tokenizer.encode("the cats").ids == [*around[0], *bare, *around[1]]


PIECES = {"▁": -9.0, "a": -20.0, "b": -20.0, "c": -20.0, "ab": -3.0, "bc": -2.0, "abc": -6.0, "▁a": -1.0} | {
    "▁ab": -5.0,
    "cc": -4.0,
    "▁bc": -7.0,
    "▁▁": -8.0,
}


def sentence_piece(**settings: Any) -> dict[str, Any]:
    """The metadata of a SentencePiece model with PIECES and all bytes."""
    octets = [f"<0x{i:02X}>" for i in range(256)]
    return pairs(
        model="llama",
        tokens=["<unk>", "<s>", "</s>", *octets, *PIECES],
        scores=[0.0] * 259 + list(PIECES.values()),
        token_type=[UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * len(PIECES),
        unknown_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **settings,
    )


def merged(text: str) -> list[str]:
    """SentencePiece's algorithm: of all pairs that are a piece, join the one of the highest score, the leftmost."""
    parts = list(text.replace(" ", "▁"))
    while True:
        scored = [
            (-PIECES[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in PIECES
        ]
        if not scored:
            return [octet for part in parts for octet in ([part] if part in PIECES else octets(part))]
        at = min(scored)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def octets(character: str) -> list[str]:
    """How a character without a piece is spelt."""
    return [f"<0x{byte:02X}>" for byte in character.encode()]


@pytest.mark.parametrize("prefix", [True, False])
def test_pieces_are_merged_by_score_and_bytes_are_a_fall_back(prefix: bool) -> None:
    tokenizer = library(sentence_piece(), add_space_prefix=prefix)
    for text in ("abc abcc", "a  bcab", "é🙂ab", "ccc  ", " abab", "x"):
        found = tokenizer.encode(text, add_special_tokens=False)
        assert found.tokens == merged(" " * prefix + text)
        assert tokenizer.decode(found.ids) == text
    assert tokenizer.encode("a").ids[0] == 1
    assert library(sentence_piece(), add_bos_token=False).encode("a").ids[0] != 1


@pytest.mark.parametrize(
    ("settings", "kind", "message"),
    [
        ({"model": "t5"}, UnsupportedError, "tokenizer.ggml.model 't5' is not supported, only gpt2 and llama"),
        ({"pre": "chameleon"}, UnsupportedError, "'chameleon' is not supported. Supported: deepseek-r1-qwen, default"),
        ({"tokens": []}, InputError, "tokens in the GGUF file's metadata should list texts"),
        ({"tokens": ["a", "a"]}, InputError, "names 2 tokens, 1 of them different, and embeds 1000"),
        ({"tokens": [str(i) for i in range(1001)]}, InputError, "names 1001 tokens"),
        ({"merges": ["a b", "q zz"]}, InputError, "merges what are no tokens"),
        ({"merges": None}, InputError, "lacks tokenizer.ggml.merges"),
        ({"bos_token_id": 999}, InputError, "bos_token_id in the GGUF file's metadata is no token's id"),
        ({"model": "llama", "scores": [0.0]}, InputError, "one score for each token"),
    ],
)
def test_metadata_that_is_refused(
    byte_level: dict[str, Any], settings: dict[str, Any], kind: type[Exception], message: str
) -> None:
    metadata = {key: value for key, value in byte_level.items() if key.rpartition(".")[2] not in settings}
    with pytest.raises(kind, match=message):
        made(metadata, **settings)
