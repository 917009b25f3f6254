"""Explaining and deploying what a PATH stands for: prices, refusals, samples, limits."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mpcinfer.client.price import price
from mpcinfer.graph.capture import capture
from tests.cli.conftest import Shell
from tests.client.fakes import FakeCluster

BUILD = """
import torch
from helper import SIZE

def build():
    return torch.nn.Linear(SIZE, 2).eval(), torch.zeros(1, SIZE)

def broken():
    return torch.nn.Linear(3, 2).eval() + 1

number = 3
"""


def test_deploying_a_function(shell: Shell, world: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("recipe.py").write_text(BUILD)
    Path("helper.py").write_text("SIZE = 3\n")
    done = shell("deploy", "recipe.py:build", "--name", "m", "--reveal", "argmax")
    assert done.code == 0 and done.out.splitlines() == [
        "deployed m version 1 (8 secret parameters)",
        "granted to all clients of the cluster; no budget; no expiry",
    ]
    assert json.loads(world.parties[0].uploads[0][0].program)["reveal"] == "argmax"
    done = shell("deploy", "recipe:build", "--name", "m", "--json", "--frac-bits", 12)
    assert done.code == 0 and (done.json["name"], done.json["version"]) == ("m", 1)
    np.save("x.npy", np.zeros((4, 3), dtype=np.float32))
    assert shell("deploy", "recipe.py:build", "--name", "m", "--samples", "x.npy").code == 0
    for wrong in (
        "recipe.py:missing",
        "recipe.py:broken",
        "recipe.py:number",
        "gone.py:build",
        "recipe.py",
        "gone.pt2",
    ):
        done = shell("deploy", wrong, "--name", "m")
        assert done.code == 2 and wrong.partition(":")[0] in done.err and done.err.count("\n") == 1, wrong
    done = shell("deploy", "recipe.py:build", "--name", "m", "--reveal", "everything")
    assert done.code == 2 and "reveal" in done.err
    assert len(world.parties[0].uploads) == 3


def test_deploying_an_exported_program(shell: Shell, world: FakeCluster) -> None:
    torch.export.save(torch.export.export(torch.nn.Linear(3, 2).eval(), (torch.zeros(1, 3),)), "m.pt2")
    assert shell("deploy", "m.pt2", "--name", "m").code == 0
    assert len(world.parties[1].uploads) == 1


DEEP = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 3)
        self.wild = Wild()

    def forward(self, x):
        return self.wild(self.first(x))

class Wild(nn.Module):
    def forward(self, x):
        return torch.erfinv(x).cumsum(-1)

def build():
    return Net().eval(), torch.zeros(1, 4)
"""


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).eval()


def deep() -> nn.Module:
    """So many layers of worst cases that no limit is proven."""
    torch.manual_seed(0)
    layers = [layer for _ in range(20) for layer in (nn.Linear(6, 6), nn.ReLU())]
    with torch.no_grad():
        for layer in layers[::2]:
            layer.weight.mul_(4)  # type: ignore[operator]
    return nn.Sequential(*layers).eval()


def exported(model: nn.Module, *shape: int) -> None:
    torch.export.save(
        torch.export.export(model, (torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(shape),)), "m.pt2"
    )


def test_explaining_needs_no_cluster(shell: Shell) -> None:
    exported(mlp(), 2, 6)
    expected = price(capture(mlp(), [torch.linspace(-1, 1, 12).reshape(2, 6)]).program, [(2, 6)], parties=3)
    done = shell("explain", "m.pt2", "--parties", 3, "--json")
    assert done.code == 0 and done.json["model"] == "torch.export program"
    total = done.json["total"]
    assert (total["rounds"], total["online_bytes"]) == (expected.total.rounds, expected.total.online_bytes)
    assert [layer["path"] for layer in done.json["layers"]] == ["0", "1", "2", "outputs"]
    assert done.json["deployment"]["parameters"] == 83 and done.json["shapes"] == [[2, 6]]
    done = shell("explain", "m.pt2", "--parties", 3)
    lines = [line.split() for line in done.out.splitlines()]
    assert next(line[1] for line in lines if line[:1] == ["total"]) == str(total["rounds"])
    assert [line[1] for line in lines if line[:1] in (["0"], ["1"], ["2"])] == ["linear", "relu", "linear"]
    assert "(proven)" in done.out and "83 secret parameters" in done.out


def test_explaining_rounds(shell: Shell) -> None:
    exported(mlp(), 2, 6)
    plain, done = shell("explain", "m.pt2", "--json"), shell("explain", "m.pt2", "--rounds", "--json")
    steps = done.json["steps"]
    assert "steps" not in plain.json and {**plain.json, "steps": steps} == done.json
    rounds = [(s["first"], s["rounds"], s["layers"]) for s in steps]
    assert rounds == [(1, 2, ["0"]), (3, 4, ["1"]), (7, 2, ["2"]), (9, 1, ["outputs"])]
    assert sum(s["online_bytes"] for s in steps) == plain.json["total"]["online_bytes"]
    lines = [line.split() for line in shell("explain", "m.pt2", "--rounds").out.splitlines()]
    start = lines.index(["ROUND", "ROUNDS", "ONLINE", "LAYERS", "OPERATORS"])
    shown = [(line[0], line[1], line[-2:]) for line in lines[start + 1 : start + 4]]
    expected = [("1-2", "2", ["0", "linear"]), ("3-6", "4", ["1", "relu"]), ("7-8", "2", ["2", "linear"])]
    assert shown == expected and lines[start + 4][-1] == "outputs" and lines[start + 5][:2] == ["total", "9"]


def test_explaining_other_shapes(shell: Shell) -> None:
    torch.export.save(
        torch.export.export(mlp(), (torch.zeros(2, 6),), dynamic_shapes=({0: torch.export.Dim("batch")},)), "m.pt2"
    )
    one, many = (shell("explain", "m.pt2", "--inputs", f"x:float[{n},6]", "--json").json for n in (2, 200))
    assert many["shapes"] == [[200, 6]] and many["total"]["rounds"] == one["total"]["rounds"]
    assert many["total"]["online_bytes"] > 50 * one["total"]["online_bytes"]
    assert shell("explain", "m.pt2", "--inputs", "x:float[2,7]").code == 2
    assert "x.npy" in shell("explain", "m.pt2", "--inputs", "x.npy").err
    torch.export.save(torch.export.export(nn.ReLU(), (torch.zeros(3),)), "m.pt2")
    for at in ("32", "length=", "length=32"):
        assert shell("explain", "m.pt2", "--at", at).code == 2


def test_all_refusals_with_their_places(shell: Shell, world: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("deep.py").write_text(DEEP)
    done = shell("explain", "deep.py:build")
    assert done.code == 1 and done.out.splitlines()[0].split() == ["OPERATOR", "AT"]
    rows = [line.split() for line in done.out.splitlines()[1:]]
    assert rows == [["aten.cumsum.default", "wild"], ["aten.erfinv.default", "wild"]]
    assert shell("explain", "deep.py:build", "--json").json["error"]["type"] == "UnsupportedError"
    done = shell("deploy", "deep.py:build", "--name", "m")
    assert done.code == 1 and "aten.erfinv.default at wild" in done.err
    assert not world.parties[0].uploads


def test_pickles_and_damaged_files_are_refused(shell: Shell, world: FakeCluster) -> None:
    torch.save(mlp().state_dict(), "m.pt2")
    Path("m.gguf").write_bytes(b"GGUF" + bytes(20))
    for file, code, word in (("m.pt2", 1, "torch.export.save"), ("m.gguf", 2, "damaged or truncated GGUF file")):
        for arguments in (("explain", file), ("deploy", file, "--name", "m")):
            done = shell(*arguments)
            assert done.code == code and word in done.err


def test_samples(shell: Shell, world: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.export.ExportedProgram, "example_inputs", None)
    exported(deep(), 2, 6)
    x = np.linspace(-2, 2, 12, dtype=np.float32).reshape(2, 6)
    np.save("x.npy", x)
    np.savez("x.npz", x=x)
    save_file({"x": torch.from_numpy(x)}, "x.safetensors")
    np.savez("y.npz", y=x)
    np.save("objects.npy", np.array([None]), allow_pickle=True)
    limits = set()
    for file in ("x.npy", "x.npz", "x.safetensors"):
        done = shell("explain", "m.pt2", "--inputs", "x:float[2,6]", "--samples", file, "--json")
        (declared,) = done.json["inputs"]
        assert done.code == 0 and not declared["proven"] and done.json["examples"] == "samples"
        limits.add(declared["limit"])
        assert shell("deploy", "m.pt2", "--inputs", "x:float[2,6]", "--samples", file, "--name", "m").code == 0
    assert len(limits) == 1 and limits.pop() >= 2
    for file in ("y.npz", "objects.npy", "m.pt2", "gone.npy"):
        done = shell("deploy", "m.pt2", "--inputs", "x:float[2,6]", "--samples", file, "--name", "m")
        assert done.code == 2 and done.err.startswith("error: "), file


def test_limits_are_not_calibrated_on_made_up_numbers(
    shell: Shell, world: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file that says nothing of inputs, as ONNX: numbers are made up, which will do if the limit is proven."""
    from mpcinfer.models import load as loader
    from mpcinfer.models.loaded import Loaded

    for model, code in ((mlp(), 0), (deep(), 2)):
        monkeypatch.setattr(loader, "_exported", lambda path, model=model: Loaded(model, (), "stand-in"))
        exported(mlp(), 2, 6)
        done = shell("deploy", "m.pt2", "--name", "m", "--inputs", "x:float[2,6]")
        assert done.code == code, done
        explained = shell("explain", "m.pt2", "--inputs", "x:float[2,6]")
        assert explained.code == 0 and ("made-up numbers" in explained.out) == (code == 2)
    assert "--samples" in done.err and len(world.parties[0].uploads) == 1
    assert "--inputs" in shell("deploy", "m.pt2", "--name", "m").err


class Words(nn.Module):
    """Ids of words, as many as there are, to one number for each of three classes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.words, self.out = nn.Embedding(11, 4), nn.Linear(4, 3)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.out(self.words(ids).mean(0))


def test_a_free_length_of_ids(shell: Shell, world: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    from mpcinfer.models import load as loader
    from mpcinfer.models.loaded import Loaded

    monkeypatch.setattr(loader, "_exported", lambda path: Loaded(Words().eval(), (), "stand-in"))
    exported(mlp(), 2, 6)
    at = ("explain", "m.pt2", "--inputs", "ids:int[1..64]", "--json")
    short, longest = shell(*at, "--at", "length=3").json, shell(*at).json
    assert (short["shapes"], longest["shapes"]) == ([[3]], [[64]])
    assert longest["total"]["online_bytes"] > 10 * short["total"]["online_bytes"]
    assert short["inputs"][0]["limit"] == 11
    assert shell(*at, "--at", "length=65").json["error"]["message"] == "length is from 1 to 64, not 65"
    done = shell("deploy", "m.pt2", "--name", "m", "--inputs", "ids:int[1..64]", "--json")
    assert done.code == 0 and done.json["calibrated_on"] in (None, "made-up numbers")
    program = json.loads(world.parties[0].uploads[0][0].program)
    assert program["sizes"] == [{"name": "length", "low": 1, "high": 64}]
