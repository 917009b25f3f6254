"""The house rules that no linter knows: scripts, docstrings, randomness, paths."""

from __future__ import annotations

import ast
import configparser
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

import mpcinfer
from tests.redaction import hidden_fields, leaks

ROOT = Path(__file__).parents[1]
PACKAGE = sorted((ROOT / "mpcinfer").rglob("*.py"))

# Randomness that is not for secrets, and a format whose loading runs code.
BANNED = re.compile(
    r"(random|pickle|_pickle|cloudpickle|dill|numpy\.random|torch\.(rand\w*|normal|bernoulli|multinomial|poisson))(\.|$)"
)
BANNED_METHODS = {
    "random_",
    "uniform_",
    "normal_",
    "bernoulli_",
    "exponential_",
    "geometric_",
    "cauchy_",
    "log_normal_",
}
# A character in brackets, so that the pattern is no match of itself.
MACHINE_PATH = re.compile(r"(^|[^A-Za-z0-9_.])[/](work|farm)/[A-Za-z.]", re.MULTILINE)


def dotted(node: ast.expr) -> str | None:
    """`a.b.c` for the expression a.b.c, None for anything that isn't a chain of names."""
    if isinstance(node, ast.Attribute):
        left = dotted(node.value)
        return left and f"{left}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else None


def banned_uses(source: str) -> Iterator[str]:
    """What a module imports or calls in spite of BANNED, whatever it was renamed to."""
    tree = ast.parse(source)
    full_names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported = [(alias.asname, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            imported = [(alias.asname or alias.name, f"{node.module}.{alias.name}") for alias in node.names]
        else:
            continue
        for name, full in imported:
            # A plain `import a.b` binds a.
            root = full.split(".")[0]
            full_names[name or root] = full if name else root
            if BANNED.match(full):
                yield f"line {node.lineno}: {full}"
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        root, _, rest = (dotted(node) or "").partition(".")
        full = f"{full_names[root]}.{rest}" if root in full_names else ""
        if BANNED.match(full) or node.attr in BANNED_METHODS:
            yield f"line {node.lineno}: {full or node.attr}"


@pytest.mark.parametrize("name", ["scripts/lint", "scripts/protos", "scripts/splines", "scripts/test", ".ci/run"])
def test_buttons_exist_and_can_be_pressed(name: str) -> None:
    assert os.access(ROOT / name, os.X_OK)


def test_scripts_are_executable_exactly_if_they_name_an_interpreter() -> None:
    for path in (ROOT / "scripts").iterdir():
        if path.is_file():
            assert os.access(path, os.X_OK) == path.read_bytes().startswith(b"#!"), path.name


def test_ci_runs_lint_and_test_and_nothing_else() -> None:
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert [line for line in lines if not line.startswith(("#", "set ", "cd "))] == ["scripts/lint", "scripts/test"]


def test_one_version() -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    assert setup["metadata"]["version"] == mpcinfer.__version__


@pytest.mark.parametrize("path", PACKAGE, ids=lambda path: str(path.relative_to(ROOT)))
def test_randomness_is_for_secrets_and_nothing_is_pickled(path: Path) -> None:
    assert list(banned_uses(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    "fault",
    [
        "import random",
        "import random as r",
        "from random import randrange",
        "import pickle",
        "def f():\n    from pickle import loads",
        "import numpy as np\nnp.random.default_rng()",
        "import numpy\nx = numpy.random.rand(3)",
        "import numpy.random, numpy.linalg",
        "import numpy.random as nr",
        "from numpy import random",
        "from numpy.random import default_rng",
        "import torch\ntorch.randn(3)",
        "import torch as t\nt.randint(3, (2,))",
        "from torch import rand_like",
        "import torch\ntorch.random.manual_seed(1)",
        "import torch\ntorch.empty(3).random_()",
    ],
)
def test_the_scan_finds_planted_faults(fault: str) -> None:
    assert list(banned_uses(fault))


@pytest.mark.parametrize(
    "clean",
    [
        "import secrets\nsecrets.token_bytes(16)",
        "import torch\ntorch.zeros(3).normal",
        "from mpcinfer.ring import random_looking",
        "'import random'",
    ],
)
def test_the_scan_leaves_clean_code_alone(clean: str) -> None:
    assert not list(banned_uses(clean))


OURS = [path for path in PACKAGE if "v1" not in path.parts]
HIDDEN = hidden_fields(path.read_text(encoding="utf-8") for path in OURS)
# What is named like a secret and is none, or is told to nobody but whose it is.
TOLD = {
    ("chat.py", "error.message"): "a syntax error of a template, which is public",
    ("chat.py", "message"): "what a template says to the data owner's own process",
    ("inputs.py", "answer"): "a size",
    ("reading.py", "self.content"): "the unknown keys of a configuration file",
    ("channel.py", "error.verify_message"): "why OpenSSL refuses a certificate",
    ("export.py", "error"): "torch.export to the model's owner, about his own module",
    ("graph.py", "error"): "onnx to the model's owner, about his own file",
}


@pytest.mark.parametrize("path", OURS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_secret_is_formatted_into_logs_or_errors(path: Path) -> None:
    found = leaks(path.read_text(encoding="utf-8"), HIDDEN)
    assert [leak for leak in found if (path.name, leak.split()[2]) not in TOLD] == []


@pytest.mark.parametrize(
    "fault",
    [
        "_log.info('got %s', share)",
        "_log.warning(f'{request}')",
        "def f(x: torch.Tensor):\n    raise InputError(f'wrong: {x}')",
        "def f(x: tensor_pb2.Tensor):\n    _log.error('%s', x)",
        "def f():\n    hello: mesh_pb2.Hello = g()\n    raise ProtocolError(str(hello))",
        "raise InputError(f'{self._seed.hex()}')",
        "raise InputError('a {} b'.format(prompt))",
        "raise InputError('a %s b' % prompt)",
        "raise InputError('text: ' + prompt)",
        "raise InputError(', '.join(str(t) for t in tokens))",
        "raise InputError(f'{tokens[0]} is unknown')",
        "raise errors.InputError(repr(job.content))",
        "raise StoreError(f'{writing.prompts}')",
        "raise StoreError(f'{first if first else weights}')",
        "_log.exception('it failed')",
        "_log.error('it failed', exc_info=True)",
        "try:\n    f()\nexcept Exception as error:\n    raise InputError(f'{error}')",
        "async def f(x: Shared):\n    def g():\n        pass\n    _log.info('%r', x)",
    ],
)
def test_a_secret_in_a_text_is_found(fault: str) -> None:
    assert list(leaks(fault, HIDDEN))


@pytest.mark.parametrize(
    "clean",
    [
        "raise InputError(f'{len(tokens)} tokens, shape {list(share.shape)}, {share.dtype}')",
        "raise InputError(f'{type(error).__name__}')",
        "try:\n    f()\nexcept OSError as error:\n    raise InputError(f'{path}: {error.strerror}') from error",
        "_log.info('model %s version %d deployed by %s', name, version, owner)",
        "share = f'{share}'",
    ],
)
def test_what_may_be_said_is_not(clean: str) -> None:
    assert not list(leaks(clean, HIDDEN))


@pytest.mark.parametrize(
    "path", [*PACKAGE, *sorted((ROOT / "tests").rglob("*.py"))], ids=lambda p: str(p.relative_to(ROOT))
)
def test_every_module_says_what_it_is(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_no_committed_file_knows_a_developer_machine() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    files = (
        subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout.decode().split("\0")
    )
    found = [
        name
        for name in filter(None, files)
        if (ROOT / name).is_file() and MACHINE_PATH.search((ROOT / name).read_bytes().decode(errors="replace"))
    ]
    assert found == []


@pytest.mark.parametrize("before", ["", "x\n", '"', "see ", "file:/", "="])
def test_a_machine_path_is_recognised(before: str) -> None:
    assert MACHINE_PATH.search(before + "/" + "work/main")
    assert MACHINE_PATH.search(before + "/" + "farm/.x")


@pytest.mark.parametrize("text", ["docs/" + "work/a", "../" + "work/a", "/" + "work", "/" + "workshop/a"])
def test_other_paths_are_not(text: str) -> None:
    assert not MACHINE_PATH.search(text)
