"""Texts that are audited with canaries, on a real cluster: made, used and found out from the command line."""

from __future__ import annotations

import io
import json
import secrets
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from mpcinfer.client import audit
from mpcinfer.client.local import LocalCluster
from tests.cli.conftest import Done, Shell
from tests.e2e.clusters import local_cluster
from tests.e2e.texts import letters, proxy, written

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

TEXTS = ("a first text for canaries, and a long one", "another one, which says something else in its line")
PROMPT = "grey geese go south"
TOKENS = 4
ASKED = "hello"
ASKED_LENGTH = len(f"user: {ASKED}<|end|>assistant:") - len("<|end|>") + 1


@dataclass
class Scene:
    """A cluster with a model, canaries of it, and canaries as they would be if it were another one."""

    cluster: LocalCluster
    shell: Shell
    canaries: Path
    wrong: Path

    def asked(self) -> int:
        """How many texts party 1 has begun for clients so far."""
        log = self.cluster.directory / "party-1-store" / "audit.log"
        shown = self.shell("audit", "show", log, "--json").json["entries"]
        return sum(entry["action"] == "generate" for entry in shown)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    with local_cluster(tmp_path_factory.mktemp("audited") / "cluster", 2) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    directory = tmp_path_factory.mktemp("models")
    return written(directory / "tiny", seed=5), written(directory / "other", seed=6)


@pytest.fixture
def scene(
    running: LocalCluster,
    models: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> Scene:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPCINFER_CLUSTER", str(running.cluster_path))
    shell = Shell(capsys, monkeypatch)
    if not shell("models", "--json").json["models"]:
        assert shell("deploy", models[0], "--name", "tiny", "--reveal", "tokens").code == 0
    Path("prompts.txt").write_text("\n".join(TEXTS))
    for model, file in zip(models, ("right.json", "wrong.json"), strict=True):
        lengths = ["--length", len(PROMPT), "--length", ASKED_LENGTH]
        options = ["--prompts", "prompts.txt", *lengths, "--max-new-tokens", TOKENS, "--out", file]
        done = shell("canaries", model, "--name", "tiny", *options, "--json")
        assert (done.code, done.json["canaries"]) == (0, 4), done.err
    return Scene(running, shell, tmp_path / "right.json", tmp_path / "wrong.json")


@pytest.fixture
def coin(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Says how many canaries come before the next request of one's own."""
    left, draw = [0], secrets.randbelow

    def below(limit: int) -> int:
        if limit != audit._COIN:
            return draw(limit)
        left[0] -= 1
        return 0 if left[0] >= 0 else limit - 1

    monkeypatch.setattr(audit.secrets, "randbelow", below)
    return lambda count: left.__setitem__(0, count)


def alarmed(done: Done) -> bool:
    return done.code == 1 and "canary alarm" in done.err


def test_a_text_is_audited(scene: Scene, coin: Callable[[int], None]) -> None:
    words = ("generate", "tiny", PROMPT, "--max-new-tokens", TOKENS, "--json")
    before, plain = scene.asked(), scene.shell(*words)
    assert plain.code == 0 and scene.asked() == before + 1
    coin(2)
    done = scene.shell(*words, "--audit", scene.canaries)
    assert done.code == 0 and done.json["tokens"] == plain.json["tokens"]
    assert scene.asked() == before + 4
    coin(1)
    done = scene.shell(*words, "--audit", scene.wrong, "--audit-rate", 0.5)
    assert alarmed(done) and done.json["error"]["type"] == "TamperingError"
    assert scene.asked() == before + 5  # what was to follow has not been sent
    coin(0)
    assert scene.shell(*words, "--audit", scene.wrong).code == 0  # nobody has looked: the planted fault


def test_what_cannot_be_audited_is_refused_before_it_is_sent(scene: Scene, coin: Callable[[int], None]) -> None:
    coin(0)
    before = scene.asked()
    for words in (
        ("a prompt of another length", "--max-new-tokens", TOKENS),
        (PROMPT, "--max-new-tokens", TOKENS + 1),
        (PROMPT, "--max-new-tokens", TOKENS, "--temperature", 0.7),
    ):
        done = scene.shell("generate", "tiny", *words, "--audit", scene.canaries)
        assert done.code == 2, done.err
    assert scene.asked() == before


def test_a_chat_is_audited(scene: Scene, coin: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    def chat(*options: object) -> Done:
        monkeypatch.setattr(sys, "stdin", io.StringIO(f"{ASKED}\n"))
        return scene.shell("chat", "tiny", "--max-new-tokens", TOKENS, *options)

    plain, before = chat(), scene.asked()
    assert plain.code == 0 and plain.out.strip("\n")
    coin(1)
    done = chat("--audit", scene.canaries)
    assert (done.code, done.out) == (0, plain.out) and scene.asked() == before + 2
    coin(1)
    assert alarmed(chat("--audit", scene.wrong)) and scene.asked() == before + 3


def test_the_proxy_audits(scene: Scene, tmp_path: Path) -> None:
    """Its coins cannot be held: at a rate of 9 in 10, 20 requests without one canary are 1 in 10^20."""
    body = {"model": "tiny", "messages": [{"role": "user", "content": ASKED}], "max_tokens": TOKENS, "temperature": 0}
    for file, rate in ((scene.canaries, 0.5), (scene.wrong, 0.9)):
        before = scene.asked()
        with proxy(scene.cluster, tmp_path / "proxy.log", "--audit", file, "--audit-rate", rate) as (url, _):
            answers = []
            while len(answers) < 20 and (not answers or answers[-1].status_code == 200):
                answers.append(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120))
                if file == scene.canaries and scene.asked() > before + len(answers):
                    break
        if file == scene.canaries:
            assert {a.status_code for a in answers} == {200}
            assert scene.asked() > before + len(answers)  # canaries were among them
        else:
            assert answers[-1].status_code >= 500 and "canary alarm" in json.dumps(answers[-1].json())


def test_letters_are_tokens(scene: Scene) -> None:
    """Lengths above are counted in tokens."""
    import tokenizers

    known = tokenizers.Tokenizer.from_str(letters().tokenizer)
    assert len(known.encode(PROMPT).ids) == len(PROMPT)
    assert len(known.encode(f"user: {ASKED}<|end|>assistant:").ids) == ASKED_LENGTH
