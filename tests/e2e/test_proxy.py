"""The proxy of the command line before a real cluster, used by the real `openai` package and a browser's requests."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
import torch

from mpcinfer import Client, ModelOwner
from mpcinfer.client.local import LocalCluster
from mpcinfer.graph.capture import capture
from mpcinfer.models.decoder import Decoder, DecoderConfig
from mpcinfer.models.rope import plain
from tests.e2e.clusters import local_cluster
from tests.e2e.texts import letters, proxy

pytestmark = pytest.mark.timeout(300)

CANARY = "zebra crossing 4711"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    torch.manual_seed(1)
    shape: dict[str, Any] = {"vocabulary": 257, "context": 160, "width": 16, "layers": 1, "heads": 2, "kv_heads": 1}
    model = Decoder(
        DecoderConfig(
            **shape, head_dim=8, hidden=24, activation="silu", eps=1e-5, rope=plain(10000.0, 8), norm="rms",
            gated=True, tied=True, scale=8**-0.5, windows=(0,),
        )
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.4)
        model.embedding.weight[256] = 0  # it never ends by itself
    ids = torch.randint(0, 256, (1, 40))
    captured = capture(
        model,
        model.example_inputs(ids),
        dynamic_shapes=model.dynamic_shapes(),
        calibration=[ids],
        reveal="tokens",
    )
    with local_cluster(tmp_path_factory.mktemp("proxy") / "cluster", 2) as running:
        with ModelOwner.connect(running.cluster_path) as owner:
            owner.upload(captured, name="tiny", vocabulary=letters())
        yield running


@pytest.fixture(scope="module")
def url(cluster: LocalCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    log = tmp_path_factory.mktemp("log") / "proxy.log"
    with proxy(cluster, log) as (address, _):
        yield address
    assert "zebra" not in log.read_text()


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as made:
        yield made


def asked(text: str = "hello") -> list[Any]:
    return [{"role": "user", "content": text}]


def test_a_conversation_streamed_and_not(client: openai.OpenAI, cluster: LocalCluster) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    first = client.chat.completions.create(model="tiny", messages=asked(CANARY), max_tokens=6, temperature=0)
    text = first.choices[0].message.content
    assert first.usage is not None and first.usage.completion_tokens == 6 and text
    parts = client.chat.completions.create(
        model="tiny",
        messages=asked(CANARY),
        max_tokens=6,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(parts)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == text
    usage = chunks[-1].usage
    assert usage is not None and usage.prompt_tokens == first.usage.prompt_tokens
    # all but the last token of the prompt were there already
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == usage.prompt_tokens - 1
    with Client.connect(cluster.cluster_path) as direct:
        assert direct.generate("tiny", asked(CANARY), max_new_tokens=6, stream=False).text == text


def test_four_at_a_time(url: str) -> None:
    async def ask() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=120) as client:
            calls = [
                client.chat.completions.create(model="tiny", messages=asked(f"{i}"), max_tokens=4, temperature=0)
                for i in range(4)
            ]
            return await asyncio.gather(*calls)

    answers = asyncio.run(ask())
    assert [a.usage.completion_tokens for a in answers] == [4] * 4


@pytest.mark.slow
def test_several_answers_to_one_prompt(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="tiny", messages=asked("n"), max_tokens=5, n=3, temperature=1.0)
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


def test_what_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-9", messages=asked())
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.chat.completions.create(model="tiny", messages=asked("x" * 400))
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError, match="seed"):
        client.chat.completions.create(model="tiny", messages=asked(), seed=1)


def test_leaving_frees_the_parties(client: openai.OpenAI, cluster: LocalCluster) -> None:
    stream = client.chat.completions.create(model="tiny", messages=asked("go"), max_tokens=120, stream=True)
    next(iter(stream))
    stream.close()
    with Client.connect(cluster.cluster_path) as direct:
        ends = time.monotonic() + 20
        while any(party.requests_waiting for party in direct.status()) and time.monotonic() < ends:
            time.sleep(0.1)
        assert not any(party.requests_waiting for party in direct.status())


def test_the_page_and_the_metrics_say_nothing_private(client: openai.OpenAI, url: str) -> None:
    client.chat.completions.create(model="tiny", messages=asked(CANARY), max_tokens=3)
    page = httpx.get(url).text
    assert "<html" in page.lower()
    metrics = httpx.get(f"{url}/metrics").text
    assert "zebra" not in metrics and "tokens" in metrics
    assert httpx.get(f"{url}/healthz").status_code == 200


@pytest.mark.slow
def test_a_party_that_dies_and_comes_back(client: openai.OpenAI, cluster: LocalCluster) -> None:
    stream = client.chat.completions.create(model="tiny", messages=asked("die"), max_tokens=120, stream=True)
    arriving = iter(stream)
    next(arriving)
    began = time.monotonic()
    cluster.kill("party/1")
    with pytest.raises(openai.APIError):
        for _ in arriving:
            pass
    assert time.monotonic() - began < 60
    cluster.restart("party/1")
    answer = client.chat.completions.create(model="tiny", messages=asked("again"), max_tokens=3)
    assert answer.usage is not None and answer.usage.completion_tokens == 3
