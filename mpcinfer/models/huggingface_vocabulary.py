"""The tokenizer, chat template and ends of answers that a Hugging Face directory describes beside a decoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers

from mpcinfer.errors import InputError
from mpcinfer.models.checkpoint import read_json
from mpcinfer.models.vocabulary import Vocabulary


def vocabulary(directory: Path, config: dict[str, Any]) -> Vocabulary | None:
    """What the files beside config.json say; None without a tokenizer.json. InputError for files that are damaged."""
    path = directory / "tokenizer.json"
    if not path.is_file():
        return None
    try:
        content = path.read_text(encoding="utf-8")
        tokenizer = tokenizers.Tokenizer.from_str(content)
    except Exception as error:  # the library raises nothing more specific
        raise InputError(f"{path} is no tokenizer.json ({type(error).__name__})") from error
    settings, generation = (
        read_json(directory / name, dict) if (directory / name).is_file() else {}
        for name in ("tokenizer_config.json", "generation_config.json")
    )
    bos, eos = (_text(settings.get(f"{name}_token")) for name in ("bos", "eos"))
    ends = [generation.get("eos_token_id"), config.get("eos_token_id"), tokenizer.token_to_id(eos) if eos else None]
    stop = {i for end in ends for i in (end if isinstance(end, list) else [end]) if type(i) is int}
    return Vocabulary(content, _template(directory, settings), bos, eos, tuple(sorted(stop)))


def _text(token: object) -> str:
    """A token as tokenizer_config.json spells it: a text, or an object with its content."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else ""


def _template(directory: Path, settings: dict[str, Any]) -> str:
    """The chat template: that of a file of its own, else that of the tokenizer; of several the default one."""
    path = directory / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"{path} cannot be read ({type(error).__name__})") from error
    found = settings.get("chat_template")
    if isinstance(found, list):
        found = next((each.get("template") for each in found if each.get("name") == "default"), "")
    return found if isinstance(found, str) else ""
