"""What a data owner does with a language model: `mpcinfer generate`, `mpcinfer chat`, `mpcinfer embed`."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from mpcinfer.cli.auditing import RATE, AuditFile, AuditRate, set_audit
from mpcinfer.cli.options import CLUSTER, ClusterPath, IdentityPath, Json
from mpcinfer.cli.output import in_bytes, in_seconds, print_json
from mpcinfer.cli.receipts import ReceiptFile, ReceiptSalts, save
from mpcinfer.errors import InputError, MpcInferError

if TYPE_CHECKING:
    from mpcinfer.client.data import Client
    from mpcinfer.client.generation import Generation, Message, Piece, Prompt, Settings, Writer
    from mpcinfer.client.proxy.backend import TextClient
    from mpcinfer.trust.receipt import Receipt

Name = Annotated[str, typer.Argument(help="The model.")]
MaxNewTokens = Annotated[int, typer.Option(min=1, help="The longest answer, in tokens.")]
Temperature = Annotated[float, typer.Option(min=0.0, max=2.0, help="0 always takes the likeliest token.")]
TopK = Annotated[int, typer.Option(min=0, help="Choose among this many tokens (0: all).")]
Penalty = Annotated[float, typer.Option(min=0.01, help="Above 1: the higher, the less is repeated.")]
Stop = Annotated[list[str] | None, typer.Option(help="A text that ends the answer.")]
Timeout = Annotated[float, typer.Option(help="Seconds for one answer.")]


@contextmanager
def connected(cluster: Path, identity: str | None, token: Path | None = None) -> Iterator[TextClient]:
    """A client of the cluster, seen as what deals with text. token: the file of the token of the user it works for."""
    from mpcinfer.client.data import Client

    with Client.connect(cluster, identity, token=token) as client:
        yield cast("TextClient", client)


def generate(
    name: Name,
    prompt: Annotated[str, typer.Argument(help="What the model continues (`-`: read it from standard input).")],
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    stop: Stop = None,
    timeout: Timeout = 600.0,
    audit: AuditFile = None,
    audit_rate: AuditRate = RATE,
    receipt: ReceiptFile = None,
    receipt_salts: ReceiptSalts = False,
    cluster: ClusterPath = CLUSTER,
    identity: IdentityPath = None,
    as_json: Json = False,
) -> None:
    """Let a model continue a private text."""
    from mpcinfer.client.generation import Settings

    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise InputError("the prompt is empty")
    settings = Settings(max_new_tokens, temperature, top_k, repetition_penalty, tuple(stop or ()))
    with connected(cluster, identity) as client:
        set_audit(cast("Client", client), audit, audit_rate)
        answer = _write(client, name, text, settings, timeout, aloud=not as_json)
    save(answer.receipt, receipt, receipt_salts)
    if as_json:
        print_json({"text": answer.text, "finish": answer.finish, "tokens": answer.tokens, **answer.spent.summary()})
    if answer.finish == "cancelled":
        raise typer.Exit(130)


def chat(
    name: Name,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    repetition_penalty: Penalty = 1.0,
    system: Annotated[str | None, typer.Option(help="What the model is told before everything else.")] = None,
    timeout: Timeout = 600.0,
    audit: AuditFile = None,
    audit_rate: AuditRate = RATE,
    cluster: ClusterPath = CLUSTER,
    identity: IdentityPath = None,
) -> None:
    """Talk with a model in private. /quit ends it, Ctrl-C stops an answer. Lines from a pipe are taken one by one."""
    from mpcinfer.client.generation import Settings

    settings = Settings(max_new_tokens, temperature, top_k, repetition_penalty)
    messages: list[Message] = [{"role": "system", "content": system}] if system else []
    with connected(cluster, identity) as client:
        set_audit(cast("Client", client), audit, audit_rate)
        for line in _lines():
            turn: list[Message] = [*messages, {"role": "user", "content": line}]
            try:
                answer = _write(client, name, turn, settings, timeout, aloud=True)
            except MpcInferError as error:
                if not sys.stdin.isatty():
                    raise
                # somebody sits there and may try again; what was asked is not part of the conversation
                print(f"error: {error}", file=sys.stderr)
                continue
            if answer.text:
                messages = [*turn, {"role": "assistant", "content": answer.text}]


def embed(
    name: Name,
    texts: Annotated[list[str], typer.Argument(metavar="TEXT...", help="The texts.")],
    timeout: Timeout = 600.0,
    cluster: ClusterPath = CLUSTER,
    identity: IdentityPath = None,
    as_json: Json = False,
) -> None:
    """Embed private texts: a vector for each."""
    with connected(cluster, identity) as client:
        vectors = [vector.flatten().tolist() for vector in client.embed(name, texts, timeout=timeout)]
    if as_json:
        print_json({"embeddings": vectors})
        return
    for vector in vectors:
        print(" ".join(f"{value:.6f}" for value in vector))


@dataclass
class Spent:
    """What an answer cost so far."""

    tokens: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    seconds: float = 0.0
    rounds: int = 0
    party_bytes: int = 0
    dealer_bytes: int = 0

    def add(self, piece: Piece) -> None:
        """Count a token."""
        self.tokens += 1
        self.rounds += piece.cost.rounds
        self.party_bytes += piece.cost.bytes_sent_per_party
        self.dealer_bytes += piece.cost.bytes_sent_by_dealer

    def line(self) -> str:
        """For people."""
        pace = f"{self.tokens / self.seconds:.3g} tokens/s" if self.seconds else "-"
        return (
            f"[{self.tokens} tokens in {in_seconds(self.seconds)}, {pace}, {self.rounds} rounds, "
            f"{in_bytes(self.party_bytes)} sent per party, {in_bytes(self.dealer_bytes)} by the dealer]"
        )

    def summary(self) -> dict[str, Any]:
        """For programs."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "cached_tokens": self.cached_tokens,
            "seconds": self.seconds,
            "tokens_per_second": self.tokens / self.seconds if self.seconds else 0.0,
            "rounds": self.rounds,
            "bytes_sent_per_party": self.party_bytes,
            "bytes_sent_by_dealer": self.dealer_bytes,
        }


@dataclass(frozen=True)
class Written:
    """An answer that has ended."""

    text: str
    tokens: list[int]
    finish: str
    spent: Spent
    receipt: Receipt | None = field(repr=False)


def _write(writer: Writer, name: str, prompt: Prompt, settings: Settings, timeout: float, *, aloud: bool) -> Written:
    """Have an answer written; aloud: print it as it comes, and then what it cost."""
    start = time.monotonic()
    generation = writer.generate(name, prompt, settings, timeout=timeout)
    spent = Spent(prompt_tokens=generation.prompt_tokens, cached_tokens=generation.cached_tokens)
    try:
        with _stoppable(generation):
            for piece in generation:
                spent.add(piece)
                if aloud:
                    print(_plain(piece.text), end="", flush=True)
    finally:
        if aloud:
            print(flush=True)
    spent.seconds = time.monotonic() - start
    if aloud:
        stopped = "[stopped] " if generation.finish == "cancelled" else ""
        print(f"{stopped}{spent.line()}", file=sys.stderr)
    return Written(
        generation.text, list(generation.tokens), generation.finish or "cancelled", spent, generation.receipt
    )


@contextmanager
def _stoppable(generation: Generation) -> Iterator[None]:
    """Meanwhile the first Ctrl-C stops the answer, and the second is an interrupt as ever."""

    def stop(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGINT, before)
        # Not here: the thread that is interrupted may hold the very lock that cancelling needs.
        threading.Thread(target=generation.cancel, name="cancel", daemon=True).start()

    before = signal.signal(signal.SIGINT, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _lines() -> Iterator[str]:
    """What is typed or piped in, line by line, until /quit or the end."""
    typed = sys.stdin.isatty()
    if typed:
        import readline  # noqa: F401  (lines can be edited and called back; nothing is written to a file)
    while True:
        try:
            line = input("> " if typed else "").strip()
        except EOFError:
            return
        if line == "/quit":
            return
        if line.startswith("/"):
            print(f"error: there is no command {line.split()[0]}; /quit ends the chat", file=sys.stderr)
        elif line:
            yield line


def _plain(text: str) -> str:
    """Without control characters: what a model writes must not steer the terminal."""
    return "".join(c for c in text if c in "\n\t" or (c.isprintable() or ord(c) > 0x9F))
