"""Reading safetensors, and the account of which tensors were taken."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mpcinfer.errors import InputError, UnsupportedError
from mpcinfer.models.checkpoint import Tensors, read_json, read_tensors

ONE, INDEX = "model.safetensors", "model.safetensors.index.json"
A, B = torch.arange(6.0).reshape(2, 3), torch.arange(4)


def shard(directory: Path) -> None:
    """A checkpoint in two files."""
    save_file({"a": A}, directory / "part-1.safetensors")
    save_file({"b": B}, directory / "part-2.safetensors")
    places = {"a": "part-1.safetensors", "b": "part-2.safetensors"}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


def test_one_file_or_several(tmp_path: Path) -> None:
    shard(tmp_path)
    found = read_tensors(tmp_path)
    assert set(found) == {"a", "b"} and found["a"].equal(A) and found["b"].equal(B)
    save_file({"c": A}, tmp_path / ONE)
    assert set(read_tensors(tmp_path)) == {"c"}


@pytest.mark.parametrize("content", [b"damaged", b"", None])
def test_a_part_that_is_missing_or_damaged(content: bytes | None, tmp_path: Path) -> None:
    shard(tmp_path)
    part = tmp_path / "part-2.safetensors"
    part.unlink()
    if content is not None:
        part.write_bytes(content)
    with pytest.raises(InputError, match="part-2.safetensors is missing or damaged"):
        read_tensors(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ('{"weight_map": {"a": "../elsewhere.safetensors"}}', "names of files beside it"),
        ('{"weight_map": {"a": 1}}', "names of files beside it"),
        ("{}", "names of files beside it"),
        ("[]", "should hold a JSON object"),
        ("{", "cannot be read"),
    ],
)
def test_an_index_that_is_none(index: str, message: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(index)
    with pytest.raises(InputError, match=message):
        read_tensors(tmp_path)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "last.ckpt"])
def test_pickled_weights_are_not_opened(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'false'\ntR.")
    with pytest.raises(UnsupportedError, match=f"{name} in .*: loading a pickle runs code; convert to safetensors"):
        read_tensors(tmp_path)


def test_no_weights_at_all(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"holds neither {ONE} nor {INDEX}"):
        read_tensors(tmp_path)


def test_json(tmp_path: Path) -> None:
    path = tmp_path / "list.json"
    path.write_text("[1]")
    assert read_json(path, list) == [1]
    with pytest.raises(InputError, match="list.json should hold a JSON object"):
        read_json(path, dict)
    path.write_bytes(b"\xff")
    for broken in (path, tmp_path / "missing.json", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            read_json(broken, dict)


def test_names_without_prefix_and_by_their_new_spelling() -> None:
    tensors = Tensors({"bert.norm.gamma": A, "model.norm.beta": A, "bare": A}, ("bert.", "model."))
    assert all(name in tensors for name in ("norm.weight", "norm.bias", "bare"))
    assert "bert.norm.gamma" not in tensors
    with pytest.raises(InputError, match="holds x twice"):
        Tensors({"bert.x": A, "x": A}, ("bert.",))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floats_become_float32(dtype: torch.dtype) -> None:
    tensors = Tensors({"a": A.to(dtype)}, ())
    assert tensors.rows("a") == 2 and tensors.rows("b") == 1
    found = tensors.take("a", (2, 3))
    assert found.dtype == torch.float32 and found.equal(A)
    tensors.check(())


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_quantised_tensors_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(UnsupportedError, match=f"a is stored as {dtype}"):
        Tensors({"a": A.to(dtype)}, ()).take("a", (2, 3))


def test_shapes_are_checked() -> None:
    with pytest.raises(InputError, match=r"a has shape \[2, 3\] where config.json demands \[3, 2\]"):
        Tensors({"a": A}, ()).take("a", (3, 2))


def test_what_is_missing_and_what_is_left_is_listed() -> None:
    tensors = Tensors({name: A for name in ("used", "left", "head.x")}, ())
    tensors.take("used", (2, 3))
    with pytest.raises(UnsupportedError, match="no use for: left$"):
        tensors.check(("head.",))
    tensors.check(("head.", "left"))
    for i in range(10):
        tensors.take(f"gone.{i}", (1,))
    with pytest.raises(InputError, match=r"lacks gone.0, .*, gone.7 and 2 more$"):
        tensors.check(("head.", "left"))
