"""Canaries from the shell: made by the owner, used by a client, an alarm that ends the command."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mpcinfer.client import audit
from tests.cli.conftest import Shell
from tests.client.fakes import FakeCluster

BUILD = "import torch\n\ndef build():\n    return torch.nn.Identity().eval(), torch.ones(2, 3)\n"


def test_canaries_are_made_and_used(shell: Shell, world: FakeCluster, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    Path("recipe.py").write_text(BUILD)
    np.save("samples.npy", np.linspace(-1, 1, 12, dtype=np.float32).reshape(4, 3))
    done = shell("canaries", "recipe.py:build", "--name", "same", "--samples", "samples.npy", "--out", "c.json")
    assert (done.code, done.out) == (0, "4 canaries of same version 1 in c.json\n")
    assert not world.parties[0].uploads and not world.parties[0].inferences
    np.save("x.npy", np.ones((2, 3), dtype=np.float32))
    said = iter([0, 0, audit._COIN - 1])
    monkeypatch.setattr(audit.secrets, "randbelow", lambda limit: next(said) if limit == audit._COIN else 0)
    done = shell("infer", "same", "x.npy", "--audit", "c.json", "--json")
    assert done.code == 0 and done.json["outputs"] == [[[1.0] * 3] * 2] and len(world.parties[0].inferences) == 3
    world.function = lambda inputs: [x + (1 << 14) * torch.ones_like(x) for x in inputs]
    monkeypatch.setattr(audit.secrets, "randbelow", lambda limit: 0)
    done = shell("infer", "same", "x.npy", "--audit", "c.json", "--json")
    assert done.code == 1 and done.json["error"]["type"] == "TamperingError" and "canary alarm" in done.err
    assert len(world.parties[0].inferences) == 4
    for arguments in (["--audit", "none.json"], ["--audit", "c.json", "--audit-rate", 2]):
        assert shell("infer", "same", "x.npy", *arguments).code == 2
        for command in (["generate", "same", "x"], ["chat", "same"], ["proxy", "--port", 0]):
            assert shell(*command, *arguments).code == 2
    Path("c.json").write_text(Path("c.json").read_text().replace("owner", "eve"))
    assert "error: " in shell("infer", "same", "x.npy", "--audit", "c.json").err
