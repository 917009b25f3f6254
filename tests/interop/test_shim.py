"""The published CrypTen on current torch, which stays as it is."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from mpcinfer.errors import UnsupportedError
from mpcinfer.interop.crypten import import_shares, install_shim


def test_it_can_be_installed_again_and_leaves_torch_alone(crypten: Any) -> None:
    export, converter = torch.onnx.export, crypten.nn.onnx_converter
    identity = converter.ONNX_TO_CRYPTEN["Identity"]
    assert install_shim() is crypten is sys.modules["crypten"]
    assert crypten.__version__ == "0.4.1"
    assert torch.onnx.export is export and export.__module__.startswith("torch.onnx")
    assert converter.ONNX_TO_CRYPTEN["Identity"] is identity


@pytest.mark.parametrize("name", ["crypten", "crypten.nn.onnx_converter"])
def test_what_is_not_installed_is_named_with_the_remedy(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UnsupportedError, match=f"{name} is not installed.*pip install --no-deps crypten==0.4.1"):
        install_shim()
    # shares that lie in files need no CrypTen
    assert len(import_shares([torch.zeros(2, dtype=torch.int64)] * 2)) == 2


def test_another_version_is_refused(crypten: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crypten, "__version__", "0.5.0")
    with pytest.raises(UnsupportedError, match=r"crypten 0.5.0 is installed, this is for 0.4.1"):
        install_shim()
