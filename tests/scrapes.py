"""Reading what `/metrics` says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from prometheus_client.parser import text_string_to_metric_families

# What a label may hold: kinds of things that are written in the code, classes of errors, indices of parties.
LABELS = {
    "action": {
        "infer",
        "generate",
        "deploy",
        "remove",
        "grant",
        "manifest",
        "refresh",
        "fill",
        "models",
        "vocabulary",
        "end_session",
    },
    "call": {"join", "deal", "forget", "witness", "corrected"},
    "kind": {"openings", "control", "prompt", "written"},
    "le": None,  # of a histogram: a number
    "on": {"openings", "votes", "dealer"},
    "party": None,
    "peer": None,
    "phase": {"online", "offline", "total"},
    "result": None,
}
_RESULT = re.compile(r"ok|internal|cancelled|[A-Z][A-Za-z]*Error")
_NUMBER = re.compile(r"[0-9.e+-]+|\+Inf")


class Figures:
    """One answer. `figures["rounds_total", "infer"]`: the figure with these values of its labels, in any order."""

    def __init__(self, text: str, prefix: str) -> None:
        self.text = text
        self._found = {
            (sample.name.removeprefix(f"{prefix}_"), frozenset(sample.labels.values())): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
        }

    def __getitem__(self, key: str | tuple[str, ...]) -> float:
        name, *labels = (key,) if isinstance(key, str) else key
        return self._found[name, frozenset(labels)]

    def get(self, *key: str) -> float:
        """As `[]`, 0 for what has not happened."""
        return self._found.get((key[0], frozenset(key[1:])), 0.0)

    def sum(self, name: str) -> float:
        """Over all labels."""
        return sum(value for (known, _), value in self._found.items() if known == name)


def strange_labels(text: str) -> Iterator[str]:
    """Labels that hold what is not foreseen."""
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            for label, value in sample.labels.items():
                allowed = LABELS.get(label, set())
                pattern = _RESULT if label == "result" else _NUMBER
                if not (value in allowed if allowed is not None else pattern.fullmatch(value)):
                    yield f"{sample.name} {label}={value}"


def families(text: str, prefix: str) -> set[str]:
    """The names of all figures, as PromQL asks for them."""
    return {name for name in re.findall(rf"^# TYPE {prefix}_(\w+) ", text, re.MULTILINE) if name[-8:] != "_created"}


def documented(prefix: str) -> set[str]:
    """The figures in the table of docs/operate.md for this prefix."""
    page = (Path(__file__).parents[1] / "docs" / "operate.md").read_text()
    table = page.partition(f"each name beginning with `{prefix}_`")[2].strip(":\n").partition("\n\n")[0]
    return {name for row in table.splitlines()[2:] for name in re.findall(r"`(\w+)`", row.split("|")[1])}
