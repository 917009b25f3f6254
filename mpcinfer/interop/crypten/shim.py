"""CrypTen 0.4.1, as published in 2022, on current torch: what it looks for in torch.onnx has moved since."""

from __future__ import annotations

import sys
import warnings
from importlib import import_module
from typing import Any

import torch

from mpcinfer.errors import UnsupportedError

VERSION = "0.4.1"

# By the names that CrypTen imports, where torch has these modules now.
_MOVED = {"torch.onnx._internal.registration": "torch.onnx._internal.torchscript_exporter.registration"}
_REMEDY = f"pip install omegaconf pyyaml onnx && pip install --no-deps crypten=={VERSION}"


def install_shim() -> Any:
    """Make `import crypten` and `crypten.nn.from_pytorch` work in this process; returns the package `crypten`.

    Torch itself stays as it is, but for a second name of one of its modules. May be called any number of times.
    UnsupportedError, with the remedy, if CrypTen 0.4.1 or something it needs is not installed.
    """
    for old, new in _MOVED.items():
        sys.modules.setdefault(old, import_module(new))
    try:
        crypten = import_module("crypten")
        converter: Any = import_module("crypten.nn.onnx_converter")
    except ModuleNotFoundError as error:
        raise UnsupportedError(f"{error.name} is not installed, which needs crypten {VERSION}: {_REMEDY}") from error
    if crypten.__version__ != VERSION:
        raise UnsupportedError(f"crypten {crypten.__version__} is installed, this is for {VERSION}: {_REMEDY}")
    converter._export_pytorch_model = _export
    if "Identity" not in converter.ONNX_TO_CRYPTEN:
        converter.ONNX_TO_CRYPTEN["Identity"] = _identity_of(crypten)
    return crypten


def _export(file: Any, model: torch.nn.Module, example: Any) -> Any:
    """What CrypTen's converter calls: torch.onnx.export, by the exporter whose output it can read."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of that exporter
        torch.onnx.export(
            model,
            example,
            file,
            dynamo=False,
            export_params=True,
            do_constant_folding=False,
            input_names=["input"],
            output_names=["output"],
            opset_version=17,
        )
    return file


def _identity_of(crypten: Any) -> Any:
    """A module for ONNX' Identity, which torch writes where two parameters are equal; CrypTen has none."""

    class Identity(crypten.nn.Module):  # type: ignore[misc]
        SUPPORTS_PLAINTEXT_INPUTS = True

        def forward(self, x: Any) -> Any:
            return x

        @staticmethod
        def from_onnx(attributes: Any = None) -> Any:
            return Identity()

    return Identity
