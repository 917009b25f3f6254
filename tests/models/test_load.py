"""Files are told apart by what is in them, whatever they are called; what would run code is not read."""

from __future__ import annotations

import importlib
import json
import sys
import types
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mpcinfer.errors import InputError, UnsupportedError
from mpcinfer.models.load import load
from mpcinfer.models.loaded import InputSpec, Loaded


@pytest.fixture
def importers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What the importers of this package are asked for; they answer with a model of no operators."""
    asked: list[tuple[Any, ...]] = []
    for name in ("huggingface", "huggingface_decoder", "gguf", "onnx"):

        def importer(*arguments: Any, name: str = name) -> Loaded:
            asked.append((name, *arguments))
            return Loaded(nn.Identity(), (), name)

        stand_in = types.ModuleType(name)
        stand_in.load = importer  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, f"mpcinfer.models.{name}", stand_in)
    return asked


def onnx_model() -> bytes:
    """An ONNX file: y = relu(x)."""
    onnx = pytest.importorskip("onnx")
    helper = onnx.helper
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    content: bytes = helper.make_model(graph, producer_name="p").SerializeToString()
    return content


def test_an_exported_program(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"  # the name says nothing
    examples = (torch.zeros(2, 3), torch.zeros(4, dtype=torch.int64))

    class Pair(nn.Module):
        def forward(self, x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
            return x.relu() + ids.sum()

    torch.export.save(torch.export.export(Pair().eval(), examples), tmp_path / "m.pt2")
    (tmp_path / "m.pt2").rename(path)
    loaded = load(path)
    assert isinstance(loaded.module, torch.export.ExportedProgram)
    assert loaded.inputs == (InputSpec("x", "float", (2, 3)), InputSpec("ids", "int", (4,)))


def test_an_onnx_file(tmp_path: Path, importers: list[tuple[Any, ...]]) -> None:
    path = tmp_path / "weights.bin"
    path.write_bytes(onnx_model())
    specs = [InputSpec("x", "float", (1, 3))]
    assert load(path, specs).kind == "onnx" and importers == [("onnx", path, specs)]
    with pytest.raises(InputError, match="task"):
        load(path, task="fill-mask")


@pytest.mark.parametrize("damage", [lambda b: b[:-1], lambda b: b + b"\x08", lambda b: b"", lambda b: b"\xff" * 40])
def test_a_damaged_onnx_file_is_no_model(tmp_path: Path, importers: list[tuple[Any, ...]], damage: Any) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(damage(onnx_model()))
    with pytest.raises(InputError, match="no model"):
        load(path)
    assert importers == []


@pytest.mark.parametrize("name", ["config.json", "modules.json"])
def test_a_hugging_face_directory(tmp_path: Path, importers: list[tuple[Any, ...]], name: str) -> None:
    with pytest.raises(InputError, match=r"config\.json"):
        load(tmp_path)
    (tmp_path / name).write_text(json.dumps({}))
    assert load(tmp_path, task="fill-mask").kind == "huggingface"
    assert importers == [("huggingface", tmp_path, "fill-mask")]


def test_decoders(tmp_path: Path, importers: list[tuple[Any, ...]]) -> None:
    path = tmp_path / "model.onnx"  # the name says nothing
    path.write_bytes(b"GGUF")
    assert load(path).kind == "gguf"
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    assert load(tmp_path, task="text-generation").kind == "huggingface_decoder"
    assert importers == [("gguf", path, None), ("huggingface_decoder", tmp_path, "text-generation", None)]


@pytest.mark.parametrize("config", ["{", "[]", '{"model_type": 1}', '{"model_type": "gemma2"}'])
def test_other_configurations_are_no_decoders(tmp_path: Path, importers: list[tuple[Any, ...]], config: str) -> None:
    (tmp_path / "config.json").write_text(config)
    assert load(tmp_path).kind == "huggingface"


def test_only_decoders_have_a_context(tmp_path: Path, importers: list[tuple[Any, ...]]) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match="only these have a context to choose"):
        load(tmp_path, context=5)


def test_pickles_are_refused_unread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, path = nn.Linear(3, 2), tmp_path / "m.pt2"
    pickles: list[Any] = [
        lambda: torch.save(model.state_dict(), path),
        lambda: torch.save(model, path, _use_new_zipfile_serialization=False),
        lambda: path.write_bytes(importlib.import_module("pickle").dumps(model.state_dict(), 4)),
    ]
    for write in pickles:
        write()
        with pytest.raises(UnsupportedError, match=r"pickle.*torch\.export\.save"):
            load(path)


def test_other_files(tmp_path: Path) -> None:
    def refused(content: bytes, kind: type[Exception], words: str) -> None:
        path = tmp_path / "m.onnx"
        path.write_bytes(content)
        with pytest.raises(kind, match=words):
            load(path)

    refused(b"GGUF\x03\0\0\0" + bytes(40), InputError, "lacks general.architecture")
    refused(b"GGUF\x03", InputError, "damaged or truncated GGUF file")
    refused(b"hello, world", InputError, "no model")
    refused(b"PK\x03\x04 but no more", InputError, "damaged")
    save_file({"w": torch.zeros(2)}, tmp_path / "w")
    refused((tmp_path / "w").read_bytes(), InputError, r"safetensors.*config\.json")
    with zipfile.ZipFile(tmp_path / "z", "w") as archive:
        archive.writestr("a/readme", "nothing")
    refused((tmp_path / "z").read_bytes(), InputError, "none of torch.export")
    with zipfile.ZipFile(tmp_path / "z", "w") as archive:
        archive.writestr("a/archive_format", "pt2")
        archive.writestr("a/models/model.json", "{}")
    refused((tmp_path / "z").read_bytes(), InputError, "cannot load")
    with pytest.raises(InputError, match="No such file"):
        load(tmp_path / "gone.pt2")
