"""What a file is, told by its content: a program of torch.export, an ONNX or GGUF model, a Hugging Face directory.

Formats that run code when they are read are refused unread, and so are those for which there is no importer.
"""

from __future__ import annotations

import importlib
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import BinaryIO

from mpcinfer.errors import InputError, UnsupportedError
from mpcinfer.models.loaded import InputSpec, Loaded

_ZIP = b"PK\x03\x04"
_PICKLE = tuple(b"\x80" + bytes([version]) for version in range(2, 6))
# fields of ONNX's ModelProto, all that may stand at the top of a file; the graph is one of them
_ONNX_FIELDS = {1, 2, 3, 4, 5, 6, 7, 8, 14, 20, 25, 26}
_ONNX_GRAPH = 7


def load(
    path: Path, inputs: Sequence[InputSpec] | None = None, task: str | None = None, context: int | None = None
) -> Loaded:
    """The model in the file or directory `path`.

    inputs: for an ONNX file, which leaves sizes open; what it means is said in `models.onnx`. task: for a Hugging Face
    directory that can do several things (see `models.huggingface`). context: the most positions of a language model
    that continues texts; by default what it was made for, 2048 at most. InputError for what is not there, is damaged
    or is no model, UnsupportedError for other formats, saying what to do.
    """
    loaded = _directory(path, task, context) if path.is_dir() else _file(path, inputs, task, context)
    if context is not None and not loaded.context:
        raise InputError(f"{path} is no language model that continues texts: only these have a context to choose")
    return loaded


def _directory(path: Path, task: str | None, context: int | None) -> Loaded:
    if not (path / "config.json").is_file() and not (path / "modules.json").is_file():
        raise InputError(f"{path} is a directory without a config.json: a Hugging Face model has one")
    if _is_decoder(path / "config.json"):
        return _importer("huggingface_decoder")(path, task, context)
    return _importer("huggingface")(path, task)


def _is_decoder(config: Path) -> bool:
    """Whether config.json is of a type that `models.decoder_families` knows; if it cannot be read, others say so."""
    try:
        found = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        return False
    from mpcinfer.models.decoder_families import FAMILIES

    return found["model_type"] in FAMILIES


def _file(path: Path, inputs: Sequence[InputSpec] | None, task: str | None, context: int | None) -> Loaded:
    if task is not None:
        raise InputError(f"{path} is no Hugging Face directory: only these have tasks to choose from")
    try:
        kind = _kind(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from error
    if kind == "onnx":
        return _importer("onnx")(path, inputs)
    if kind == "gguf":
        return _importer("gguf")(path, context)
    return _exported(path)


def _importer(name: str) -> Callable[..., Loaded]:
    """`load` of a module of this package, which is imported only when it is needed: it may bring much with it."""
    found: Callable[..., Loaded] = importlib.import_module(f"mpcinfer.models.{name}").load
    return found


def _kind(path: Path) -> str:
    """ "export", "onnx" or "gguf"; raises for anything else."""
    with path.open("rb") as file:
        start = file.read(16)
        if start.startswith(_ZIP):
            return _archive(path)
        if start.startswith(_PICKLE):
            raise _pickled(path)
        if start.startswith(b"GGUF"):
            return "gguf"
        if start[8:9] == b"{" and int.from_bytes(start[:8], "little") <= os.fstat(file.fileno()).st_size:
            raise InputError(
                f"{path} is a safetensors file, weights without a model: give the directory with its config.json"
            )
        if _is_onnx(file):
            return "onnx"
    raise InputError(
        f"{path} is no model: give a .pt2 file of torch.export, an ONNX or GGUF file, or a Hugging Face directory"
    )


def _archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            members = {name.partition("/")[2] for name in archive.namelist()}
    except zipfile.BadZipFile as error:
        raise InputError(f"{path} is a damaged archive") from error
    if "archive_format" in members and any(name.startswith("models/") for name in members):
        return "export"
    if "data.pkl" in members:
        raise _pickled(path)
    raise InputError(f"{path} is an archive, but none of torch.export")


def _pickled(path: Path) -> UnsupportedError:
    return UnsupportedError(
        f"{path} is a pickle (as torch.save and torch.jit.save write them), which could run any code when it is read: "
        "load it where you trust it, and write the model with torch.export.save"
    )


def _is_onnx(file: BinaryIO) -> bool:
    """Whether the whole file is a message with the fields of a ModelProto, a graph among them; contents are skipped."""
    size = file.seek(0, os.SEEK_END)
    at, found = 0, set()
    while at < size:
        file.seek(at)
        head = file.read(20)
        tag, used = _varint(head)
        value, more = _varint(head[used:])
        field, wire_type = tag >> 3, tag & 7
        if not used or not more or wire_type not in (0, 2) or field not in _ONNX_FIELDS:
            return False
        found.add(field)
        at += used + more + (value if wire_type == 2 else 0)
    return at == size and _ONNX_GRAPH in found


def _varint(data: bytes) -> tuple[int, int]:
    """A number and how many bytes it takes; 0 of them if there is none."""
    value = 0
    for i, byte in enumerate(data[:10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value, i + 1
    return 0, 0


def _exported(path: Path) -> Loaded:
    import torch
    from torch.utils._pytree import tree_leaves

    try:
        exported = torch.export.load(path)
    except Exception as error:  # whatever a damaged archive makes torch raise
        raise InputError(f"cannot load {path} as an exported program ({type(error).__name__})") from error
    examples = [x for x in tree_leaves(exported.example_inputs) if isinstance(x, torch.Tensor)]
    names = exported.graph_signature.user_inputs
    inputs = tuple(
        InputSpec(str(name), "float" if x.dtype.is_floating_point else "int", tuple(x.shape))
        for name, x in zip(names, examples, strict=False)
    )
    return Loaded(exported, inputs, "torch.export program")
