"""`scripts/bench generate`: prompts and tokens of a real language model, alone and several texts at a time."""

from __future__ import annotations

import argparse
import os
import threading
import time
from contextlib import ExitStack

from bench_cases import figures, reset_peaks, summed
from bench_models import LOGITS, smollm
from bench_network import visited
from bench_ours import Ours, report
from bench_report import Row
from demo_smollm import continued
from rich.console import Console

from mpcinfer.client.examples import captured_model
from mpcinfer.client.generation import StepCost
from mpcinfer.models.decoder import Decoder

TIMEOUT = 6 * 3600.0  # seconds, for a text
TOGETHER_STEPS = 20  # tokens after the prompt, of each text: more than are written before the last prompt is taken in
TOLERANCE = 0.1  # of a logit: where two of them are closer than twice that, either may be chosen


def run_generate(options: argparse.Namespace, say: Console) -> Row:
    """Prompts, tokens, and texts together, over every network: the report."""
    before = os.getloadavg()
    rows: list[Row] = []
    networks: dict[str, Row | None] = {}
    for place, network in visited(options.networks, networks):
        with ExitStack() as stack:
            with say.status(f"{place}: starting a dealer and parties"):
                ours = Ours(options.parties, stack, network)
            for row in _measured(ours, options, say, place):
                rows.append(
                    {"network": place, "right": f"logits within {LOGITS.text}", "peers": {}, "ratios": {}, **row}
                )
    settings = {"parties": options.parties, "repeat": options.repeat, "steps": options.steps, "tiny": options.tiny}
    settings |= {"together": options.together}
    return report(options, before, [], settings, networks, rows)


def _measured(ours: Ours, options: argparse.Namespace, say: Console, place: str) -> list[Row]:
    loaded, ids = smollm(options.tiny)
    assert isinstance(loaded.module, Decoder)
    prompt, steps = list(ids), min(options.steps, loaded.context - len(ids))
    reset_peaks(ours)
    began = time.perf_counter()
    with say.status(f"{place}: deploying"):
        ours.owner.upload(captured_model(loaded), name="bench")
    deployed = {"deploy_seconds": time.perf_counter() - began}
    many = min(max(steps, TOGETHER_STEPS), loaded.context - len(ids)) if options.together else steps
    plain, logits = continued(loaded.module, prompt, many + 1, ())

    def judged(tokens: list[int]) -> Row:
        """Tokens are right as far as they are those in plaintext, or one that plaintext nearly prefers."""
        equal = sum(a == b for a, b in zip(tokens, plain, strict=False))
        first = next((i for i, (a, b) in enumerate(zip(tokens, plain, strict=False)) if a != b), None)
        near = first is None or float(logits[first][plain[first]] - logits[first][tokens[first]]) <= 2 * TOLERANCE
        return {"verdict": f"{equal} of {len(tokens)} tokens equal", "right": near}

    prompts = []
    for turn in range(-1, options.repeat):
        with say.status(f"{place}: prompt {turn + 1} of {options.repeat}"):
            written = _written(ours, prompt, 1)
        if turn >= 0:
            prompts.append(written)
    found = [
        {
            "name": f"a prompt of {len(prompt)} tokens",
            "ours": figures(ours, [w[0] for w in prompts]) | deployed | judged(prompts[-1][0]["tokens"]),
        }
    ]
    say.print(f"{place}: prompt {found[-1]['ours']['online']['seconds']:.2f} s online")
    with say.status(f"{place}: {steps} tokens"):
        written = _written(ours, prompt, steps + 1)
    own = figures(ours, written[1:]) | deployed | judged([t for w in written for t in w["tokens"]])
    # as of several texts: what is dealt ahead now and then is waited for, and counts
    own["tokens_per_second"] = len(written[1:]) / (written[-1]["at"] - written[0]["at"])
    found.append({"name": f"a token after {len(prompt)} to {len(prompt) + steps - 1}", "ours": own})
    say.print(f"{place}: token {own['online']['seconds']:.2f} s online")
    if options.together:
        with say.status(f"{place}: {options.together} texts at a time"):
            found.append(_together(ours, prompt, options.together, many))
        found[-1]["ours"] |= deployed | judged(found[-1]["ours"].pop("tokens"))
        say.print(f"{place}: together {found[-1]['ours']['tokens_per_second']:.2f} tokens/s")
    ours.owner.remove("bench")
    return found


def _written(ours: Ours, prompt: list[int], most: int) -> list[Row]:
    """A text by a client who knows of no earlier one: a request for each token, the first with the prompt."""
    steps = []
    with ours.connect() as client:
        began = time.perf_counter()
        answer = client.generate("bench", prompt, max_new_tokens=most, timeout=TIMEOUT)
        for piece in answer:
            now = time.perf_counter()
            costs: list[StepCost] = [piece.cost, answer.prompt_cost] if not steps else [piece.cost]
            steps.append({"client": now - began, "at": now, "tokens": [piece.token], **summed(costs)})
            began = now
    return steps


def _together(ours: Ours, prompt: list[int], count: int, steps: int) -> Row:
    """Several texts, the same prompt each, by as many clients: tokens per second while all are being written."""
    written: list[list[Row]] = [[] for _ in range(count)]

    def write(i: int) -> None:
        written[i] = _written(ours, prompt, steps + 1)

    threads = [threading.Thread(target=write, args=[i]) for i in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    begin, end = max(text[0]["at"] for text in written), min(text[-1]["at"] for text in written)
    tokens = [step["at"] for text in written for step in text[1:] if begin < step["at"] <= end]
    later = [step for text in written for step in text[1:]]
    own = figures(ours, later) | {
        "tokens_per_second": len(tokens) / (end - begin) if end > begin else len(later) / (end - written[0][0]["at"]),
        "tokens": [token for step in written[0] for token in step["tokens"]],
        "texts_equal": len({tuple(t for step in text for t in step["tokens"]) for text in written}) == 1,
    }
    return {"name": f"a token of each of {count} texts at a time", "ours": own}
