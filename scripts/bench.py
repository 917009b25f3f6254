"""Measure private inference on this machine, beside other systems, in one run. Run by scripts/bench.

Definitions are in docs/benchmarks/README.md.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from functools import partial
from pathlib import Path

import torch
from bench_accuracy import Reused, run_accuracy
from bench_functions import functions
from bench_generate import run_generate
from bench_growth import AXES, run_growth
from bench_models import DEFAULT, WORKLOADS
from bench_network import NETWORKS
from bench_ops import workloads
from bench_peers.host import PEERS, SOCKETS
from bench_plots import plot
from bench_report import Row, markdown, right, tables
from bench_run import run_timed
from bench_together import run_together
from rich.console import Console
from rich.table import Table


def main() -> int:
    """0 if all our results are there and right."""
    parser = _parser()
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that processes are stopped on the way out
    torch.set_num_threads(1)  # this process is the client: its idle threads would spin on the parties' cores
    say = Console(width=None if sys.stdout.isatty() else 160)
    if options.command == "page":
        report = json.loads(options.report.read_text())
    else:
        _check(parser, options)
        report = _run(parser, options, say)
        for title, (header, lines) in tables(report):
            table = Table(*header, title=title)
            for line in lines:
                table.add_row(*line)
            say.print(table)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n")
    if options.markdown:
        options.markdown.write_text(markdown(report, plot(report, options.markdown)))
    return 0 if options.command == "page" or right(report) else 1


def _run(parser: argparse.ArgumentParser, options: argparse.Namespace, say: Console) -> Row:
    if options.command == "accuracy":
        return _accuracy(parser, options, say)
    if options.command == "generate":
        return run_generate(options, say)
    if options.command == "growth":
        return run_growth(options, say)
    if options.command == "together":
        return run_together(options, say)
    if options.command == "ops":
        return run_timed(options, say, {each.name: partial(lambda w: w, each) for each in workloads(options.tiny)})
    known = WORKLOADS[options.command]
    return run_timed(options, say, {name: partial(known[name], options.tiny) for name in options.workloads})


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="scripts/bench", description="Measure private inference on this machine.")
    commands = parser.add_subparsers(dest="command", required=True)
    ops = commands.add_parser("ops", help="what single operations cost, beside other systems")
    models = commands.add_parser("models", help="what blocks and models cost, of this system alone")
    beside = commands.add_parser("peers", help="operations, functions, blocks and models, beside other systems")
    generate = commands.add_parser("generate", help="what a real language model's tokens and prompts cost")
    together = commands.add_parser("together", help="requests at the same time, and one after the other")
    growth = commands.add_parser("growth", help="how time and bytes grow with length, batch and parties")
    accuracy = commands.add_parser("accuracy", help="how exact functions are, beside other systems")
    for command, networks in ((ops, "loopback"), (models, "loopback,lan,wan"), (beside, "loopback")):
        _timed(command, networks)
    _timed(generate, "loopback,lan,wan")
    _timed(growth, "loopback")
    _timed(together, "loopback,wan")
    for command, name, default in (
        (models, "models", ",".join(DEFAULT["models"])),
        (beside, "peers", ",".join(DEFAULT["peers"])),
        (together, "models", "minilm"),
    ):
        known = ", ".join(WORKLOADS[name])
        command.add_argument("--workloads", type=_names, default=default, help=f"which of {known}")
        command.set_defaults(choices=tuple(WORKLOADS[name]))
    generate.add_argument("--steps", type=int, default=32, help="tokens after the prompt that are measured")
    generate.add_argument("--together", type=int, default=8, help="texts that are written at the same time, or 0")
    together.add_argument("--together", type=int, default=16, help="how many requests at the same time")
    growth.add_argument("--axes", type=_names, default=",".join(AXES), help=f"which of {', '.join(AXES)}")
    accuracy.add_argument("--parties", type=_numbers, default="2,3", help="numbers of computing parties")
    names = ", ".join(f.operation for f in functions(tiny=True))
    accuracy.add_argument("--functions", type=_names, default="", help=f"only these of {names}")
    accuracy.add_argument("--reuse", type=Path, metavar="FILE", help="take other systems' results from this report")
    for command, peers in ((ops, SOCKETS), (beside, tuple(PEERS)), (accuracy, tuple(PEERS))):
        known = ", ".join(peers)
        command.add_argument("--peers", type=_names, default=",".join(peers), help=f"which of {known} to run; or none")
        command.set_defaults(known=peers)
    for command in (ops, models, beside, generate, together, growth, accuracy):
        command.add_argument("--tiny", action="store_true", help="tiny inputs, only to see that everything works")
        command.add_argument("--json", type=Path, metavar="FILE", help="write the report here")
        command.add_argument("--markdown", type=Path, metavar="FILE", help="write it here as a page, plots beside it")
    page = commands.add_parser("page", help="make the page of an earlier report")
    page.add_argument("report", type=Path, help="what --json wrote")
    page.add_argument("markdown", type=Path, help="the page to write; plots are written beside it")
    return parser


def _timed(command: argparse.ArgumentParser, networks: str) -> None:
    command.add_argument("--repeat", type=int, default=5, help="measured runs (medians are reported)")
    command.add_argument("--parties", type=int, default=2, help="number of computing parties, 2 or more")
    command.add_argument("--networks", type=_names, default=networks, help=f"which of {', '.join(NETWORKS)}")
    command.set_defaults(peers=[], known=())


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _names(text: str) -> list[str]:
    return [] if text in ("", "none") else text.split(",")


def _check(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    parties = options.parties if isinstance(options.parties, list) else [options.parties]
    if min(parties) < 2 or not set(options.peers) <= set(options.known):
        parser.error(f"at least 2 parties; peers are {', '.join(options.known)} or none")
    if options.command == "accuracy":
        if not set(options.functions) <= {f.operation for f in functions(tiny=True)}:
            parser.error("no such function; see --help")
        return
    if options.repeat < 1:
        parser.error("at least 1 run")
    if not options.networks or not set(options.networks) <= set(NETWORKS):
        parser.error(f"networks are {', '.join(NETWORKS)}")
    if not set(getattr(options, "workloads", ())) <= set(getattr(options, "choices", ())):
        parser.error(f"workloads are {', '.join(options.choices)}")
    if not set(getattr(options, "axes", ())) <= set(AXES):
        parser.error(f"axes are {', '.join(AXES)}")


def _accuracy(parser: argparse.ArgumentParser, options: argparse.Namespace, say: Console) -> Row:
    earlier = json.loads(options.reuse.read_text()) if options.reuse else None
    try:
        return run_accuracy(options, say, earlier)
    except Reused as error:
        parser.error(f"{options.reuse}: {error}; run without --reuse")


if __name__ == "__main__":
    sys.exit(main())
