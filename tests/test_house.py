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
