"""Text to ids and back."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Library
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from mpcinfer.client.text import Tokenizer
from mpcinfer.errors import InputError

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "the", "cat", "sat"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A tokenizer.json that would pad to 8 and cut off behind 6 tokens, as published ones often do."""
    library = Library(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    library.add_special_tokens(WORDS[:4])
    library.pre_tokenizer = Whitespace()
    library.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    library.enable_padding(length=8)
    library.enable_truncation(6)
    library.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_ids_and_back(path: Path) -> None:
    tokenizer = Tokenizer.load(path)
    ids = tokenizer.ids("the cat sat")
    assert ids.dtype == torch.int64 and ids.tolist() == [2, 4, 5, 6, 3]
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == "the cat sat"


def test_nothing_is_padded_or_cut_off(path: Path) -> None:
    tokenizer = Tokenizer.load(str(path))
    for count in (1, 6, 40):
        assert tokenizer.ids("cat " * count).tolist() == [2, *[5] * count, 3]


def test_a_text_that_is_too_long_is_refused_without_saying_it(path: Path) -> None:
    tokenizer = Tokenizer.load(path, limit=5)
    assert len(tokenizer.ids("the cat sat")) == 5
    with pytest.raises(InputError, match="^the text has 6 tokens and the model takes 5: shorten the text$"):
        tokenizer.ids("the cat sat cat")


def test_a_text_without_tokens_is_refused(tmp_path: Path) -> None:
    Library(WordLevel({"[UNK]": 0}, unk_token="[UNK]")).save(str(tmp_path / "bare.json"))
    with pytest.raises(InputError, match="no token"):
        Tokenizer.load(tmp_path / "bare.json").ids("")


def test_files_that_are_no_tokenizer(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    for name in ("other.json", "missing.json"):
        with pytest.raises(InputError, match=f"{name} is missing or no tokenizer.json"):
            Tokenizer.load(tmp_path / name)
