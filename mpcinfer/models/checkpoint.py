"""The tensors of a safetensors checkpoint, in one file or in several, and what takes them by name."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open

from mpcinfer.errors import InputError, UnsupportedError

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLED = ("pytorch_model*.bin", "*.pt", "*.pth", "*.ckpt")
_FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LISTED = 8

_T = TypeVar("_T")


def read_json(path: Path, kind: type[_T]) -> _T:
    """What a JSON file holds, a dict or a list; InputError if it is missing, damaged or something else."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({type(error).__name__}); it should be a JSON file") from error
    if not isinstance(found, kind):
        raise InputError(f"{path} should hold a JSON {'object' if kind is dict else 'list'}")
    return found


def read_tensors(directory: Path) -> dict[str, torch.Tensor]:
    """All tensors of the checkpoint in `directory`, by name.

    InputError if it has no weights or damaged ones, UnsupportedError for weights in pickled files only.
    """
    tensors: dict[str, torch.Tensor] = {}
    for path in _files(directory):
        try:
            with safe_open(path, framework="pt") as file:
                tensors |= {name: file.get_tensor(name) for name in file.keys()}
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} is missing or damaged ({type(error).__name__})") from error
    return tensors


def _files(directory: Path) -> list[Path]:
    if (directory / _ONE).exists():
        return [directory / _ONE]
    if (directory / _INDEX).exists():
        shards = read_json(directory / _INDEX, dict).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(s, str) and s == Path(s).name for s in shards.values()):
            raise InputError(f"{directory / _INDEX} should map tensors to the names of files beside it")
        return [directory / shard for shard in sorted(set(shards.values()))]
    pickled = [path.name for pattern in _PICKLED for path in sorted(directory.glob(pattern))]
    if pickled:
        raise UnsupportedError(
            f"{', '.join(pickled)} in {directory}: loading a pickle runs code; convert to safetensors"
        )
    raise InputError(f"{directory} holds neither {_ONE} nor {_INDEX}")


class Tensors:
    """A checkpoint's tensors, handed out by name; keeps account of which are missing and which nobody took."""

    def __init__(
        self, tensors: dict[str, torch.Tensor], prefixes: Iterable[str], settings: str = "config.json"
    ) -> None:
        """A name is known without the one of `prefixes` that it begins with. LayerNorms may speak of gamma and beta.

        settings: what demands shapes, for messages.
        """
        self._settings = settings
        self._left: dict[str, torch.Tensor] = {}
        for full, tensor in tensors.items():
            name = full.removeprefix(next((p for p in prefixes if full.startswith(p)), ""))
            for old, new in ((".gamma", ".weight"), (".beta", ".bias")):
                name = name.removesuffix(old) + new if name.endswith(old) else name
            if name in self._left:
                raise InputError(f"the checkpoint holds {name} twice")
            self._left[name] = tensor
        self._missing: list[str] = []

    def __contains__(self, name: str) -> bool:
        return name in self._left

    def rows(self, name: str) -> int:
        """The first size of a tensor, 1 if it has none or is missing, which `take` finds out."""
        return next(iter(self._left[name].shape), 1) if name in self else 1

    def take(self, name: str, shape: Iterable[int]) -> torch.Tensor:
        """A tensor as float32; zeros if it is missing, which `check` reports."""
        shape = tuple(shape)
        tensor = self._left.pop(name, None)
        if tensor is None:
            self._missing.append(name)
            return torch.zeros(shape)
        if tensor.dtype not in _FLOATS:
            raise UnsupportedError(
                f"{name} is stored as {tensor.dtype}: only float16, bfloat16, float32 and float64 are"
            )
        if tuple(tensor.shape) != shape:
            raise InputError(f"{name} has shape {list(tensor.shape)} where {self._settings} demands {list(shape)}")
        return tensor.float()

    def check(self, ignored: tuple[str, ...]) -> None:
        """InputError naming what is missing, UnsupportedError naming what is left and begins with no `ignored`."""
        if self._missing:
            raise InputError(f"the checkpoint lacks {_listed(self._missing)}")
        left = [name for name in self._left if not name.startswith(ignored)]
        if left:
            raise UnsupportedError(
                f"the checkpoint holds tensors that this architecture has no use for: {_listed(left)}"
            )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(sorted(names)[:_LISTED]) + more
