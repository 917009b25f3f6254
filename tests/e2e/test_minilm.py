"""The real MiniLM on clusters of processes: private ids in, embeddings out, as close to float32 as a search needs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from demo_minilm import DOCUMENTS, LEAST_COSINE, LIMITS, QUERIES, Texts, deploy, misplaced, search
from pretrained import sentence_encoder
from torch.nn.functional import cosine_similarity

from mpcinfer import Client, ModelOwner
from mpcinfer.client.examples import captured_model
from mpcinfer.client.text import Tokenizer
from mpcinfer.models.loaded import Loaded
from tests.e2e.clusters import local_cluster

pytestmark = [pytest.mark.slow, pytest.mark.net, pytest.mark.timeout(7200)]

# tokens of the texts that are cut from one that runs on
LENGTHS = [3 + 117 * i // 29 for i in range(30)]


@pytest.fixture(scope="module")
def minilm() -> Loaded:
    return sentence_encoder()


@contextmanager
def deployed(minilm: Loaded, directory: Path, parties: int) -> Iterator[Client]:
    with local_cluster(directory, parties, limits=LIMITS) as cluster:
        with ModelOwner.connect(cluster.cluster_path) as owner:
            deploy(owner, minilm, "minilm")
        with Client.connect(cluster.cluster_path) as client:
            yield client


def cut(minilm: Loaded, tokens: int) -> str:
    """The longest beginning of all documents, in whole words, that has at most so many tokens."""
    assert minilm.tokenizer is not None
    tokenizer = Tokenizer.load(minilm.tokenizer)
    words = " ".join(DOCUMENTS).split()
    return next(
        text
        for count in range(tokens, 0, -1)
        if len(tokenizer.ids(text := " ".join(words[tokens : tokens + count]))) <= tokens
    )


def test_embeddings_and_rankings(minilm: Loaded, tmp_path: Path) -> None:
    texts = [*DOCUMENTS, *(cut(minilm, tokens) for tokens in LENGTHS)]
    assert len(set(texts)) == 60
    with deployed(minilm, tmp_path / "cluster", 2) as client:
        found = Texts.embedded(client, "minilm", minilm, texts)
        queries = Texts.embedded(client, "minilm", minilm, QUERIES)
    assert (min(found.tokens), max(found.tokens)) == (3, 120)
    assert found.cosines().min() >= LEAST_COSINE and queries.cosines().min() >= LEAST_COSINE
    plain = search(found.plain[: len(DOCUMENTS)], queries.plain)
    private = search(found.private[: len(DOCUMENTS)], queries.private)
    assert misplaced(plain, private) == 0


def test_three_parties(minilm: Loaded, tmp_path: Path) -> None:
    texts = [cut(minilm, tokens) for tokens in (3, 11, 40, 120)]
    with deployed(minilm, tmp_path / "cluster", 3) as client:
        found = Texts.embedded(client, "minilm", minilm, texts)
    assert found.cosines().min() >= LEAST_COSINE


def test_texts_are_embedded_by_name(minilm: Loaded, tmp_path: Path) -> None:
    with local_cluster(tmp_path / "cluster", 2, limits=LIMITS) as cluster:
        with ModelOwner.connect(cluster.cluster_path) as owner:
            owner.upload(captured_model(minilm), name="minilm", vocabulary=minilm.words())
        with Client.connect(cluster.cluster_path) as client:
            found = client.embed("minilm", DOCUMENTS[:3])
            assert minilm.vocabulary is None and client.vocabulary("minilm").tokenizer
    assert minilm.tokenizer is not None
    ids = [Tokenizer.load(minilm.tokenizer).ids(text) for text in DOCUMENTS[:3]]
    plain = [minilm.module(x).flatten() for x in ids]
    assert all(cosine_similarity(a, b, 0) >= LEAST_COSINE for a, b in zip(found, plain, strict=True))
