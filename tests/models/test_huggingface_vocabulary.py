"""What the files beside config.json say of texts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from mpcinfer.errors import InputError
from mpcinfer.models.huggingface_vocabulary import vocabulary


def directory(path: Path, **files: Any) -> Path:
    """A directory with a tokenizer and other files."""
    Tokenizer(WordLevel({"<s>": 0, "</s>": 1, "a": 2}, unk_token="a")).save(str(path / "tokenizer.json"))
    for name, content in files.items():
        (path / f"{name}.json").write_text(json.dumps(content))
    return path


def test_all_that_can_be_said(tmp_path: Path) -> None:
    settings = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "chat_template": "one"}
    directory(tmp_path, tokenizer_config=settings, generation_config={"eos_token_id": [5, 4]})
    found = vocabulary(tmp_path, {"eos_token_id": 7})
    assert found is not None
    assert found.tokenizer == (tmp_path / "tokenizer.json").read_text()
    assert (found.bos, found.eos, found.template, found.stop) == ("<s>", "</s>", "one", (1, 4, 5, 7))
    (tmp_path / "chat_template.jinja").write_text("two")
    found = vocabulary(tmp_path, {})
    assert found is not None and (found.template, found.stop) == ("two", (1, 4, 5))


def test_little_is_said(tmp_path: Path) -> None:
    found = vocabulary(directory(tmp_path, tokenizer_config={"bos_token": None}), {})
    assert found is not None and (found.bos, found.eos, found.template, found.stop) == ("", "", "", ())
    (tmp_path / "tokenizer.json").unlink()
    assert vocabulary(tmp_path, {}) is None


@pytest.mark.parametrize(("names", "chosen"), [(("tool_use", "default"), "default"), (("rag",), "")])
def test_of_several_templates_the_default_one(names: tuple[str, ...], chosen: str, tmp_path: Path) -> None:
    several = [{"name": name, "template": name} for name in names]
    found = vocabulary(directory(tmp_path, tokenizer_config={"chat_template": several}), {})
    assert found is not None and found.template == chosen


def test_damaged_files(tmp_path: Path) -> None:
    (directory(tmp_path) / "generation_config.json").write_text("{")
    with pytest.raises(InputError, match="generation_config.json cannot be read"):
        vocabulary(tmp_path, {})
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="is no tokenizer.json"):
        vocabulary(tmp_path, {})
