"""A cluster of processes, a real model, private answers beside plaintext ones. Run by scripts/demo."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import demo_digits
import demo_minilm
import demo_smollm
from rich.console import Console


def main() -> int:
    """0 if private and plaintext answers agree on everything but near-ties."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--model",
        choices=("digits", "minilm", "smollm"),
        default="digits",
        help="digits: a CNN classifies images (default); minilm: a transformer embeds sentences, to search among them; "
        "smollm: a language model answers a question",
    )
    parser.add_argument("--parties", type=int, default=2, help="number of computing parties, 2 or more")
    parser.add_argument("--images", type=int, default=200, help="how many digits to classify, at most 500")
    parser.add_argument("--tokens", type=int, default=24, help="how long an answer may be")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the figures here too")
    options = parser.parse_args()
    if options.parties < 2 or options.images < 1 or options.tokens < 1:
        parser.error("at least 2 parties, 1 image and 1 token")
    say = Console()
    if options.model == "digits":
        result = demo_digits.run(options.parties, options.images, say)
        good = demo_digits.show(result, say)
    elif options.model == "minilm":
        result = demo_minilm.run(options.parties, say)
        good = demo_minilm.show(result, say)
    else:
        result = demo_smollm.run(options.parties, options.tokens, say)
        good = demo_smollm.show(result, say)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
