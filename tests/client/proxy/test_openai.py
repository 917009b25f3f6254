"""The openai package, unmodified, against the proxy."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from typing import Any

import openai
import pytest

from mpcinfer.client.generation import Settings
from mpcinfer.errors import BusyError, DeadlineError, UnavailableError
from tests.client.proxy.writer import CONTEXT, FakeWriter, words

pytestmark = pytest.mark.timeout(30)

HELLO: Any = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello dear world"}]


def test_a_chat_completion(client: openai.OpenAI, writer: FakeWriter) -> None:
    done = client.chat.completions.create(model="tiny", messages=HELLO, temperature=0)
    assert done.choices[0].message.content == "HELLO DEAR WORLD"
    assert done.choices[0].message.role == "assistant" and done.choices[0].finish_reason == "stop"
    assert done.id.startswith("chatcmpl-") and abs(done.created - time.time()) < 60 and done.model == "tiny"
    assert done.usage is not None and done.usage.prompt_tokens_details is not None
    assert (done.usage.prompt_tokens, done.usage.completion_tokens, done.usage.total_tokens) == (5, 3, 8)
    assert done.usage.prompt_tokens_details.cached_tokens == 0
    assert writer.asked == [(HELLO, Settings(max_new_tokens=128, temperature=0.0), 60.0)]
    again = client.chat.completions.create(model="tiny", messages=HELLO, max_tokens=2)
    assert again.choices[0].finish_reason == "length" and again.usage is not None
    assert again.usage.prompt_tokens_details is not None and again.usage.prompt_tokens_details.cached_tokens == 5
    assert writer.asked[1][1] == Settings(max_new_tokens=2, temperature=1.0)


def test_settings_arrive(client: openai.OpenAI, writer: FakeWriter) -> None:
    client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]},
            {"role": "user", "content": "hello"},
        ],
        max_completion_tokens=7,
        temperature=0.5,
        stop=["a", "b"],
        user="u",
        metadata={"k": "v"},
        store=False,
        service_tier="auto",
        seed=None,
        top_p=1,
        presence_penalty=0,
        frequency_penalty=0.0,
        extra_body={"top_k": 40, "repetition_penalty": 1.2},
    )
    (prompt, settings, _) = writer.asked[0]
    assert prompt == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    assert settings == Settings(7, 0.5, 40, 1.2, ("a", "b"))


def test_a_streamed_chat_completion(client: openai.OpenAI, writer: FakeWriter) -> None:
    seen = threading.Event()
    held: list[bool] = []

    def before(number: int) -> None:
        if number == 2:
            held.append(seen.wait(10))

    writer.before = before
    text = ""
    with client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = []
        for chunk in stream:
            chunks.append(chunk)
            text += (chunk.choices[0].delta.content or "") if chunk.choices else ""
            if text == "HELLO DEAR":
                seen.set()
    assert text == "HELLO DEAR WORLD" and held == [True], "a token is not held back until the next"
    assert chunks[0].choices[0].delta.role == "assistant" and len({chunk.id for chunk in chunks}) == 1
    assert [c.choices[0].finish_reason for c in chunks if c.choices] == [None] * 4 + ["stop"]
    assert chunks[-1].choices == [] and chunks[-1].usage is not None and chunks[-1].usage.total_tokens == 8
    assert all(chunk.usage is None for chunk in chunks[:-1])


def test_stop(client: openai.OpenAI) -> None:
    done = client.chat.completions.create(model="tiny", messages=HELLO, stop="DEAR")
    assert done.choices[0].message.content == "HELLO" and done.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_share_the_work_on_the_prompt(client: openai.OpenAI, writer: FakeWriter, stream: bool) -> None:
    first = threading.Event()

    def before(number: int) -> None:
        if not first.is_set():
            assert len(writer.begun) == 1, "the others wait for the first token"
            time.sleep(0.1)
            assert len(writer.begun) == 1
            first.set()

    writer.before = before
    if stream:
        texts: dict[int, str] = {}
        with client.chat.completions.create(model="tiny", messages=HELLO, n=3, stream=True) as chunks:
            for chunk in chunks:
                for choice in chunk.choices:
                    texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
        assert texts == dict.fromkeys(range(3), "HELLO DEAR WORLD")
    else:
        done = client.chat.completions.create(model="tiny", messages=HELLO, n=3)
        assert [c.index for c in done.choices] == [0, 1, 2]
        assert {c.message.content for c in done.choices} == {"HELLO DEAR WORLD"}
        assert done.usage is not None
        assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (5, 9)
    assert len(writer.begun) == 3


def test_concurrent_requests(url: str, writer: FakeWriter) -> None:
    together = threading.Barrier(4, timeout=10)
    writer.before = lambda number: None if number else (together.wait(), None)[1]

    async def main() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:

            async def ask(text: str) -> str | None:
                messages: Any = [{"role": "user", "content": text}]
                done = await client.chat.completions.create(model="tiny", messages=messages)
                return done.choices[0].message.content

            return await asyncio.gather(*(ask(f"one two {i}") for i in range(4)))

    assert asyncio.run(main()) == [f"ONE TWO {i}" for i in range(4)]
    assert not together.broken, "all four were at work at the same time"


def test_models(client: openai.OpenAI) -> None:
    assert [m.id for m in client.models.list()] == ["tiny", "encoder"]
    assert client.models.retrieve("tiny").owned_by == "owner/o"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other")
    assert caught.value.code == "model_not_found"


def test_completions(client: openai.OpenAI, writer: FakeWriter) -> None:
    done = client.completions.create(model="tiny", prompt="once upon", max_tokens=5)
    assert done.choices[0].text == "ONCE UPON" and done.object == "text_completion" and done.id.startswith("cmpl-")
    assert done.usage is not None and done.usage.total_tokens == 4
    several = client.completions.create(model="tiny", prompt=["a", "b c"], n=2)
    assert [c.text for c in several.choices] == ["A", "A", "B C", "B C"]
    assert several.usage is not None and several.usage.prompt_tokens == 3
    with client.completions.create(model="tiny", prompt="once upon", stream=True) as stream:
        assert "".join(chunk.choices[0].text for chunk in stream) == "ONCE UPON"
    assert writer.asked[-1][1].max_new_tokens == 16


def test_responses(client: openai.OpenAI, writer: FakeWriter) -> None:
    done = client.responses.create(model="tiny", input="hello world", instructions="be kind", metadata={"k": "v"})
    assert done.output_text == "HELLO WORLD" and done.status == "completed" and done.id.startswith("resp_")
    assert done.usage is not None and (done.usage.input_tokens, done.usage.output_tokens) == (4, 2)
    assert done.metadata == {"k": "v"} and done.error is None and done.store is False  # type: ignore[attr-defined]
    assert writer.asked[0][0] == [
        {"role": "system", "content": "be kind"},
        {"role": "user", "content": "hello world"},
    ]
    followed = client.responses.create(
        model="tiny",
        input=[
            {"role": "user", "content": "hi"},
            *[item.to_dict() for item in done.output],  # type: ignore[list-item]
            {"role": "user", "content": [{"type": "input_text", "text": "and now"}]},
        ],
        max_output_tokens=1,
    )
    assert followed.output_text == "AND" and followed.status == "incomplete"
    assert followed.incomplete_details is not None and followed.incomplete_details.reason == "max_output_tokens"
    assert writer.asked[1][0][1] == {"role": "assistant", "content": "HELLO WORLD"}


def test_streamed_responses(client: openai.OpenAI) -> None:
    with client.responses.create(model="tiny", input="hello world", stream=True) as stream:
        events = list(stream)
    assert [event.type for event in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert [event.sequence_number for event in events] == list(range(10))
    with client.responses.stream(model="tiny", input="hello world") as helper:
        helper.until_done()
        assert helper.get_final_response().output_text == "HELLO WORLD"


def test_embeddings(client: openai.OpenAI) -> None:
    for encoding in ("float", "base64"):
        texts = client.embeddings.create(model="encoder", input=["a b", "abc"], encoding_format=encoding)
        if encoding == "float":
            assert [d.embedding for d in texts.data] == [[2.0, 3.0], [1.0, 3.0]]
        assert texts.usage.prompt_tokens == 3
    # by default the client asks for base64 and unpacks it
    assert client.embeddings.create(model="encoder", input="a b").data[0].embedding == [2.0, 3.0]
    assert client.embeddings.create(model="encoder", input=[5, 6]).data[0].embedding == [5.0, 6.0]
    lists = client.embeddings.create(model="encoder", input=[[5], [6, 7]])
    assert [d.embedding for d in lists.data] == [[5.0], [6.0, 7.0]] and lists.usage.total_tokens == 3
    with pytest.raises(openai.NotFoundError):
        client.embeddings.create(model="other", input="a")


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_wrong_model_and_a_long_prompt(client: openai.OpenAI) -> None:
    for stream in (False, True):
        with pytest.raises(openai.NotFoundError) as missing:
            client.chat.completions.create(model="other", messages=HELLO, stream=stream)
        assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
        with pytest.raises(openai.BadRequestError) as long:
            client.completions.create(model="tiny", prompt=" ".join(words(CONTEXT + 1)), stream=stream)
        assert long.value.code == "context_length_exceeded" and long.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("seed", 1),
        ("top_p", 0.9),
        ("presence_penalty", 0.5),
        ("frequency_penalty", -1),
        ("temperature", 2.5),
        ("temperature", "hot"),
        ("temperature", True),
        ("n", 9),
        ("n", 0),
        ("n", 1.0),
        ("max_tokens", 0),
        ("max_completion_tokens", "many"),
        ("stop", ["a", "b", "c", "d", "e"]),
        ("stop", [""]),
        ("stop", 5),
        ("logprobs", True),
        ("top_logprobs", 2),
        ("logit_bias", {"5": 100}),
        ("tools", [{"type": "function", "function": {"name": "f"}}]),
        ("tool_choice", "required"),
        ("functions", [{"name": "f"}]),
        ("response_format", {"type": "json_object"}),
        ("modalities", ["text", "audio"]),
        ("reasoning_effort", "high"),
        ("store", True),
        ("service_tier", "flex"),
        ("stream", "yes"),
        ("stream_options", {"include_usage": True}),
        ("top_k", -1),
        ("repetition_penalty", 0),
        ("min_p", 0.1),
        ("model", 5),
        ("model", None),
        ("messages", None),
        ("messages", []),
        ("messages", "hello"),
    ],
)
def test_bad_parameters_of_chats(client: openai.OpenAI, writer: FakeWriter, param: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, extra_body={param: value})
    assert caught.value.param == param and caught.value.type == "invalid_request_error" and not writer.asked


@pytest.mark.parametrize(
    ("message", "param"),
    [
        ("hello", "messages[0]"),
        ({"role": "tool", "content": "x"}, "messages[0].role"),
        ({"role": [], "content": "x"}, "messages[0].role"),
        ({"role": "user"}, "messages[0].content"),
        ({"role": "user", "content": 5}, "messages[0].content"),
        ({"role": "user", "content": "\ud800"}, "messages[0].content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages[0].content"),
        ({"role": "user", "content": [{"type": [], "text": "x"}]}, "messages[0].content"),
        ({"role": "user", "content": "x", "name": "ann"}, "messages[0]"),
        ({"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}, "messages[0]"),
    ],
)
def test_bad_messages(client: openai.OpenAI, message: Any, param: str) -> None:
    content = json.dumps({"model": "tiny", "messages": [message]}).encode()
    headers = {"Content-Type": "application/json"}
    with pytest.raises(openai.BadRequestError) as caught:
        client.post("/chat/completions", cast_to=object, content=content, options={"headers": headers})
    assert caught.value.param == param


@pytest.mark.parametrize(
    ("path", "base", "param", "value"),
    [
        ("completions", {"prompt": "a"}, "prompt", [1, 2]),
        ("completions", {"prompt": "a"}, "prompt", []),
        ("completions", {"prompt": "a"}, "echo", True),
        ("completions", {"prompt": "a"}, "suffix", "end"),
        ("completions", {"prompt": "a"}, "best_of", 3),
        ("completions", {"prompt": "a"}, "logprobs", 1),
        ("completions", {"prompt": list("abc")}, "n", 3),
        ("completions", {"prompt": "a"}, "messages", []),
        ("responses", {"input": "a"}, "previous_response_id", "resp_1"),
        ("responses", {"input": "a"}, "tools", [{"type": "web_search"}]),
        ("responses", {"input": "a"}, "store", True),
        ("responses", {"input": "a"}, "background", True),
        ("responses", {"input": "a"}, "conversation", "c"),
        ("responses", {"input": "a"}, "text", {"format": {"type": "json_object"}}),
        ("responses", {"input": "a"}, "reasoning", {"effort": "high"}),
        ("responses", {"input": "a"}, "truncation", "auto"),
        ("responses", {"input": "a"}, "stop", "x"),
        ("responses", {"input": "a"}, "metadata", "x"),
        ("responses", {"input": "a"}, "input", []),
        ("responses", {}, "input", None),
        ("embeddings", {"input": "a"}, "dimensions", 3),
        ("embeddings", {"input": "a"}, "encoding_format", "int8"),
        ("embeddings", {"input": "a"}, "input", ""),
        ("embeddings", {"input": "a"}, "input", []),
        ("embeddings", {"input": "a"}, "input", [-1]),
        ("embeddings", {"input": "a"}, "input", ["a", 5]),
        ("embeddings", {"input": "a"}, "input", {"a": 1}),
        ("embeddings", {"input": "a"}, "input", ["a"] * 2049),
    ],
)
def test_bad_parameters_elsewhere(client: openai.OpenAI, path: str, base: Any, param: str, value: Any) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.post(f"/{path}", cast_to=object, body={"model": "tiny", **base, param: value})
    assert caught.value.param == param


# --- failures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (BusyError("full"), 429, "rate_limit_exceeded"),
        (UnavailableError("party/1 is gone"), 503, "unavailable"),
        (DeadlineError("too slow"), 504, "deadline_exceeded"),
        (ZeroDivisionError("a secret"), 500, None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_failures_before_the_first_token(
    client: openai.OpenAI, writer: FakeWriter, error: Exception, status: int, code: str | None, stream: bool
) -> None:
    def fail(number: int) -> None:
        raise error

    writer.before = fail
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(model="tiny", messages=HELLO, stream=stream)
    assert (caught.value.status_code, caught.value.code) == (status, code)
    assert "a secret" not in str(caught.value)


def fail_later(number: int) -> None:
    if number == 2:
        raise UnavailableError("party/1 has gone away")


def test_a_failure_in_the_middle_of_a_stream(client: openai.OpenAI, writer: FakeWriter) -> None:
    writer.before = fail_later
    text = ""
    with client.chat.completions.create(model="tiny", messages=HELLO, stream=True) as stream:
        with pytest.raises(openai.APIError, match="party/1 has gone away") as caught:
            for chunk in stream:
                text += chunk.choices[0].delta.content or ""
    assert text == "HELLO DEAR" and caught.value.code == "unavailable"
    with client.responses.create(model="tiny", input="hello dear world", stream=True) as events:
        with pytest.raises(openai.APIError, match="party/1 has gone away"):
            list(events)


def test_a_failure_of_one_choice_ends_the_others(client: openai.OpenAI, writer: FakeWriter) -> None:
    writer.delay = 0.05
    writer.answer = " ".join(words(100))

    def before(number: int) -> None:
        if number == 3:
            writer.before = lambda number: None
            raise UnavailableError("gone")

    writer.before = before
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="tiny", messages=HELLO, n=3)
    assert all(g.cancelled.wait(1) for g in writer.begun[1:])
