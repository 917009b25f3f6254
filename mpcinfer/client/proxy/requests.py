"""What each endpoint is asked for: bodies of OpenAI's API, checked, as settings and prompts of ours."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from mpcinfer.client.generation import Message, Prompt, Settings
from mpcinfer.client.proxy.backend import Text
from mpcinfer.client.proxy.body import HARMLESS, Body, ParameterError, check_text

MAX_CHOICES = 8
MAX_STOPS = 4
MAX_EMBEDDED = 2048
_MAX_TOKENS = 1 << 24
_MAX_ID = (1 << 31) - 1
_COMPLETION_TOKENS = 16  # what OpenAI's /v1/completions writes when nobody says how much

# OpenAI's roles: `developer` is what newer clients call `system`.
_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
_TEXT_PARTS = ("text", "input_text", "output_text")


@dataclass(frozen=True)
class Writing:
    """Answers to write: `n` for each prompt. `echo` are fields that the response repeats."""

    model: str
    prompts: tuple[Prompt, ...] = field(repr=False)
    settings: Settings
    n: int = 1
    stream: bool = False
    include_usage: bool = False
    echo: tuple[tuple[str, Any], ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Embedding:
    """Texts to embed; base64: the vectors as little-endian float32."""

    model: str
    texts: tuple[Text, ...] = field(repr=False)
    base64: bool


def chat(content: object) -> Writing:
    """POST /v1/chat/completions."""
    body = Body(content)
    model = body.text("model")
    messages = _messages(body.take("messages"), "messages")
    limits = [body.integer(name, 1, _MAX_TOKENS) for name in ("max_completion_tokens", "max_tokens")]
    if None not in limits and limits[0] != limits[1]:
        raise ParameterError("max_tokens and max_completion_tokens differ; send one", "max_tokens", "invalid_value")
    settings = _settings(body, limits[0] or limits[1], Settings.max_new_tokens, _stop(body.take("stop")))
    n = body.integer("n", 1, MAX_CHOICES) or 1
    stream, include_usage = _stream(body)
    _refuse(body)
    _refuse_tools(body)
    for name in ("functions", "function_call", "web_search_options"):
        body.only(name, why="there are no tools")
    body.only("logprobs", False, why=_NO_PROBABILITIES)
    body.only("response_format", {"type": "text"}, why="answers are plain text")
    body.only("modalities", ["text"], why="text is all there is")
    body.only("audio", why="text is all there is")
    body.only("prediction", why="predicted outputs are not supported")
    body.only("reasoning_effort", "none", why="there is no separate reasoning")
    body.only("verbosity", "medium", why="the model's verbosity cannot be set")
    body.finish()
    return Writing(model, (messages,), settings, n, stream, include_usage)


def completion(content: object) -> Writing:
    """POST /v1/completions."""
    body = Body(content)
    model = body.text("model")
    given = body.take("prompt")
    prompts = given if isinstance(given, list) else [given]
    if not prompts or any(not isinstance(prompt, str) for prompt in prompts):
        raise ParameterError("prompt must be a text or a list of texts, not token ids", "prompt", "invalid_type")
    checked = tuple(check_text(prompt, "prompt") for prompt in prompts)
    limit = body.integer("max_tokens", 1, _MAX_TOKENS)
    settings = _settings(body, limit, _COMPLETION_TOKENS, _stop(body.take("stop")))
    n = body.integer("n", 1, MAX_CHOICES) or 1
    if n * len(checked) > MAX_CHOICES:
        raise ParameterError(f"at most {MAX_CHOICES} answers in one request", "n", "invalid_value")
    stream, include_usage = _stream(body)
    _refuse(body)
    body.only("logprobs", why=_NO_PROBABILITIES)
    body.only("echo", False, why="the prompt is not repeated")
    body.only("suffix", "", why="nothing can be written into the middle of a text")
    body.only("best_of", n, why=_NO_PROBABILITIES)
    body.finish()
    return Writing(model, checked, settings, n, stream, include_usage)


def response(content: object) -> Writing:
    """POST /v1/responses."""
    body = Body(content)
    model = body.text("model")
    given = body.take("input")
    messages = [{"role": "user", "content": check_text(given, "input")}] if not isinstance(given, list) else given
    prompt = _messages(messages, "input")
    instructions = body.take("instructions")
    if instructions is not None:
        prompt = [{"role": "system", "content": check_text(instructions, "instructions")}, *prompt]
    limit = body.integer("max_output_tokens", 1, _MAX_TOKENS)
    metadata = body.take("metadata")
    if not isinstance(metadata, dict | None):
        raise ParameterError("metadata must be an object", "metadata", "invalid_type")
    settings = _settings(body, limit, Settings.max_new_tokens, ())
    stream = body.flag("stream")
    options = Body(body.take("stream_options") or {})
    options.only("include_obfuscation", False, why="events are not padded")
    options.finish()
    body.only("previous_response_id", why="nothing is stored here; send the whole conversation as input")
    body.only("conversation", why="nothing is stored here; send the whole conversation as input")
    body.only("background", False, why="an answer is written while its caller listens")
    body.only("include", [], why="there is nothing more to include")
    body.only("prompt", why="there are no stored prompts")
    body.only("reasoning", {}, {"effort": None}, {"effort": "none"}, why="there is no separate reasoning")
    body.only("text", {}, {"format": {"type": "text"}}, why="answers are plain text")
    body.only("truncation", "disabled", why="nothing is cut out of a conversation; shorten it")
    body.only("max_tool_calls", why="there are no tools")
    _refuse(body)
    _refuse_tools(body)
    body.finish()
    echo = {"instructions": instructions, "metadata": metadata or {}, "max_output_tokens": limit}
    return Writing(model, (prompt,), settings, stream=stream, echo=tuple(echo.items()))


def embedding(content: object) -> Embedding:
    """POST /v1/embeddings."""
    body = Body(content)
    model = body.text("model")
    given = body.take("input")
    one = isinstance(given, str) or (isinstance(given, list) and bool(given) and type(given[0]) is int)
    texts = [given] if one else given
    if not isinstance(texts, list) or not 1 <= len(texts) <= MAX_EMBEDDED:
        raise ParameterError(
            f"input must be a text, a list of token ids, or a list of up to {MAX_EMBEDDED} of these",
            "input",
            "invalid_type" if given is not None else "missing_required_parameter",
        )
    encoding = body.take("encoding_format") or "float"
    if encoding not in ("float", "base64"):
        raise ParameterError("encoding_format must be float or base64", "encoding_format", "invalid_value")
    body.only("dimensions", why="vectors have the length that the model gives them")
    body.ignore(*HARMLESS)
    body.finish()
    return Embedding(model, tuple(map(_text, texts)), encoding == "base64")


_NO_PROBABILITIES = "the parties reveal tokens, no probabilities"


def _settings(body: Body, limit: int | None, default: int, stop: tuple[str, ...]) -> Settings:
    """How to choose tokens. Where OpenAI's API has a default that is not ours, its own holds."""
    temperature = body.number("temperature", 0.0, 2.0)
    return Settings(
        max_new_tokens=limit or default,
        temperature=1.0 if temperature is None else temperature,
        top_k=body.integer("top_k", 0, _MAX_ID) or 0,
        repetition_penalty=body.number("repetition_penalty", 0.01, 100.0) or 1.0,
        stop=stop,
    )


def _refuse(body: Body) -> None:
    """What several endpoints have and this proxy has not."""
    penalty = "only 0 is supported; repetition_penalty is what there is instead"
    body.only("presence_penalty", 0, why=penalty)
    body.only("frequency_penalty", 0, why=penalty)
    body.only("top_p", 1, why="only 1 is supported; top_k is what there is instead")
    body.only("seed", why="the noise comes from the dealer, afresh for each token, so that no seed can repeat it")
    body.only("logit_bias", {}, why="scores of tokens are secret, also while they are compared")
    body.only("top_logprobs", 0, why=_NO_PROBABILITIES)
    body.only("store", False, why="nothing is stored here")
    body.only("service_tier", "auto", "default", why="there is one tier")
    body.ignore(*HARMLESS)


def _refuse_tools(body: Body) -> None:
    body.only("tools", [], why="there are no tools")
    body.only("tool_choice", "none", "auto", why="there are no tools")
    body.only("parallel_tool_calls", True, False, why="there are no tools")


def _stream(body: Body) -> tuple[bool, bool]:
    """Whether to stream, and whether the stream ends with the usage."""
    stream = body.flag("stream")
    given = body.take("stream_options")
    if given is not None and not stream:
        raise ParameterError("stream_options is for streams: set stream", "stream_options", "invalid_value")
    options = Body(given if given is not None else {})
    include_usage = options.flag("include_usage")
    options.only("include_obfuscation", False, why="chunks are not padded")
    options.finish()
    return stream, include_usage


def _stop(value: object) -> tuple[str, ...]:
    stops = [value] if isinstance(value, str) else value or []
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(s, str) and s for s in stops):
        raise ParameterError(f"stop must be a text or a list of up to {MAX_STOPS} texts", "stop", "invalid_value")
    return tuple(check_text(stop, "stop") for stop in stops)


def _messages(value: object, param: str) -> list[Message]:
    if not isinstance(value, list) or not value:
        code = "missing_required_parameter" if value is None else "invalid_type"
        raise ParameterError(f"{param} must be a list of messages, at least one", param, code)
    return [_message(message, f"{param}[{index}]") for index, message in enumerate(value)]


def _message(value: object, param: str) -> Message:
    if not isinstance(value, dict):
        raise ParameterError(f"{param} must be an object", param, "invalid_type")
    role, content = value.get("role"), value.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        raise ParameterError(f"{param}: the role must be one of {', '.join(_ROLES)}", f"{param}.role", "invalid_value")
    # An answer of an earlier turn comes back as it was sent, with an id, a status and fields that are empty.
    for key, given in value.items():
        empty = given is None or given == [] or key in ("role", "content", "id", "status")
        if not empty and not (key == "type" and given == "message"):
            raise ParameterError(f"{param} can have a role and a content only", param, "unsupported_parameter")
    if not isinstance(content, list):
        return {"role": _ROLES[role], "content": check_text(content, f"{param}.content")}
    return {"role": _ROLES[role], "content": "".join(_part(part, f"{param}.content") for part in content)}


def _part(value: object, param: str) -> str:
    if not isinstance(value, dict) or value.get("type") not in _TEXT_PARTS:
        raise ParameterError(f"{param}: only parts of text are supported", param, "unsupported_parameter")
    if any(given not in (None, []) for field, given in value.items() if field not in ("type", "text")):
        raise ParameterError(f"{param}: a part of text has a type and a text only", param, "unsupported_parameter")
    return check_text(value.get("text"), param)


def _text(value: object) -> Text:
    """One input of /v1/embeddings."""
    if isinstance(value, str) and value:
        return check_text(value, "input")
    if isinstance(value, list) and value and all(type(i) is int and 0 <= i <= _MAX_ID for i in value):
        ids: Sequence[int] = tuple(value)
        return ids
    raise ParameterError("each input must be a text or a list of token ids, and not empty", "input", "invalid_type")
