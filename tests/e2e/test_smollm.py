"""The real SmolLM2-135M-Instruct under encryption: the same words as in plaintext, and what they cost."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from pretrained import language_model

from mpcinfer import Client, ModelOwner
from mpcinfer.client.examples import captured_model
from mpcinfer.client.text import Tokenizer
from mpcinfer.models.decoder import Decoder
from mpcinfer.models.loaded import Loaded
from tests.e2e.clusters import local_cluster

pytestmark = [pytest.mark.slow, pytest.mark.net, pytest.mark.timeout(10800)]

_log = logging.getLogger(__name__)

MORE = 32
TEXT = (
    "The lighthouse had stood on the cliff for two hundred years before anyone thought of asking who had built it. "
    "The records in the town hall burned in 1871, and the oldest families told three different stories. One said that "
    "a merchant paid for it after his brother's ship was lost; another, that it was a debt of honour between two "
    "captains. The third story was the strangest. According to it nobody had built the tower at all: it had simply "
    "been there one morning, white and finished, with a lamp already burning. Children liked that version best, of "
    "course, and so did the keeper, who told it to every visitor who climbed the stairs. He had a way of stopping "
    "before the end, looking out at the water, and waiting until somebody asked what happened next. Then he would "
    "shrug and say that the rest depended on the weather, and on whether they had brought anything to eat. Nobody ever "
    "had, and so nobody ever heard how it ended, which was exactly how the keeper liked it."
)
# tokens of each prompt
LENGTHS = (5, 9, 16, 24, 40, 63, 90, 120, 160, 200)
MOST_ERROR = 0.1
LEAST_EQUAL = 0.99
# of a step at 32 to 64 tokens, n = 2
MOST_ROUNDS, MOST_SENT, MOST_DEALT = 2800, 12e6, 60e6


@pytest.fixture(scope="module")
def smollm() -> Loaded:
    return language_model(context=512)


@pytest.fixture(scope="module")
def client(smollm: Loaded, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with deployed(smollm, tmp_path_factory.mktemp("smollm"), 2) as client:
        yield client


class deployed:
    """A client of a cluster that has the model, logits included."""

    def __init__(self, smollm: Loaded, directory: Path, parties: int) -> None:
        self._cluster = local_cluster(directory / "cluster", parties)
        self._smollm = smollm

    def __enter__(self) -> Client:
        cluster = self._cluster.__enter__()
        with ModelOwner.connect(cluster.cluster_path) as owner:
            captured = captured_model(self._smollm, reveal="logits")
            owner.upload(captured, name="smollm", vocabulary=self._smollm.vocabulary)
        return Client.connect(cluster.cluster_path)

    def __exit__(self, *error: object) -> None:
        self._cluster.__exit__(None, None, None)


def prompts(smollm: Loaded) -> list[list[int]]:
    assert smollm.vocabulary is not None
    ids = Tokenizer.of(smollm.vocabulary).ids(TEXT).tolist()
    assert len(ids) >= max(LENGTHS)
    # of texts that differ from the first token
    return [ids[i : i + length] if i + length <= len(ids) else ids[-length:] for i, length in enumerate(LENGTHS)]


def plain(model: Decoder, ids: list[int]) -> torch.Tensor:
    """Float32 logits of the next token."""
    with torch.no_grad():
        return model(torch.tensor([ids]), *model.empty_caches())[0][0].double()


def forced(client: Client, model: Decoder, prompt: list[int], more: int) -> list[tuple[int, int, float, float]]:
    """For each position: the token chosen privately, the one in plaintext, the gap between these two in plaintext, and
    the largest error of a logit; the text goes on with the one in plaintext."""
    found, text = [], list(prompt)
    for _ in range(more):
        answer = client.generate("smollm", text, max_new_tokens=1, stream=False)
        expected = plain(model, text)
        ours, theirs = answer.tokens[0], int(expected.argmax())
        error = float((answer.logits[0] - expected).abs().max())
        found.append((ours, theirs, float(expected[theirs] - expected[ours]), error))
        text.append(theirs)
    return found


def same_words(results: list[tuple[int, int, float, float]]) -> None:
    largest = max(error for *_, error in results)
    equal = sum(ours == theirs for ours, theirs, *_ in results) / len(results)
    _log.info("%d positions: %.2f %% equal, largest error of a logit %.4f", len(results), 100 * equal, largest)
    assert largest <= MOST_ERROR
    assert all(gap < 2 * largest for ours, theirs, gap, _ in results if ours != theirs)
    assert equal >= LEAST_EQUAL


def test_three_parties(smollm: Loaded, tmp_path: Path) -> None:
    """First, since the cluster of the other tests takes as much memory."""
    assert isinstance(smollm.module, Decoder)
    with deployed(smollm, tmp_path, 3) as client:
        same_words([r for prompt in prompts(smollm)[:2] for r in forced(client, smollm.module, prompt, 4)])


def test_the_same_words_as_plaintext(client: Client, smollm: Loaded) -> None:
    assert isinstance(smollm.module, Decoder)
    results = []
    for prompt in prompts(smollm):
        results += forced(client, smollm.module, prompt, MORE)
    same_words(results)


def test_what_a_token_costs(client: Client, smollm: Loaded) -> None:
    prompt = prompts(smollm)[4][:33]
    answer = client.generate("smollm", prompt, max_new_tokens=24)
    for piece in answer:
        cost = piece.cost
        assert cost.rounds <= MOST_ROUNDS and cost.bytes_sent_by_dealer <= MOST_DEALT
        if len(answer.tokens) > 1:  # the first came with the prompt
            assert cost.bytes_sent_per_party <= MOST_SENT


def test_free_running(client: Client, smollm: Loaded) -> None:
    assert isinstance(smollm.module, Decoder) and smollm.vocabulary is not None
    prompt = "The capital of France is"
    answer = client.generate("smollm", prompt, max_new_tokens=12, stream=False)
    ids = Tokenizer.of(smollm.vocabulary).ids(prompt).tolist()
    for i, token in enumerate(answer.tokens):
        expected = plain(smollm.module, ids)
        if token != int(expected.argmax()):
            _log.info("first divergence at token %d, gap %.4f", i, float(expected.max() - expected[token]))
            break
        ids.append(token)
    _log.info("private: %s", answer.text)
    assert "Paris" in answer.text
