"""What scripts/bench shows: a report (see bench.py) as tables for a terminal or a page."""

from __future__ import annotations

from typing import Any

Row = dict[str, Any]


def our_table(report: Row) -> tuple[list[str], list[list[str]]]:
    """Our results: a header and a line per operation."""
    header = ["operation", "online", "offline", "total", "rounds", "sent per party", "sent by dealer", "max error"]
    lines = []
    for row in report["ops"]:
        ours = row["ours"]
        if "failed" in ours:
            lines.append([row["name"], f"failed: {ours['failed']}", *[""] * 6])
            continue
        online, offline, total = ours["online"], ours["offline"], ours["total"]
        sent = _size(online["bytes_sent_per_party"]), _size(offline["bytes_sent_by_dealer"])
        times = [_ms(phase["seconds"]) for phase in (online, offline, total)]
        lines.append([row["name"], *times, f"{online['rounds']:.0f}", *sent, _error(ours)])
    return [*header, "deploy", "memory, party / dealer"], [
        line + _resources(row["ours"]) for line, row in zip(lines, report["ops"], strict=True)
    ]


def _resources(ours: Row) -> list[str]:
    if "failed" in ours:
        return ["", ""]
    memory = ours["peak_rss_bytes"]
    return [f"{ours['deploy_seconds']:.2f} s", f"{memory['party'] / 1e6:.0f} / {memory['dealer'] / 1e6:.0f} MB"]


def peer_table(report: Row) -> tuple[list[str], list[list[str]]]:
    """A header and a line per operation and peer."""
    header = ["operation", "system", "variant", "total", "rounds", "sent per party", "max error"]
    header += ["our online is faster by", "our total is faster by"]
    lines = []
    for row in report["ops"]:
        for name, peer in row["peers"].items():
            line = [row["name"], name, peer["variant"]]
            if "failed" in peer:
                lines.append([*line, f"failed: {peer['failed']}", *[""] * 5])
                continue
            ratios = [row["ratios"].get(f"{phase}_vs_{name}_total") for phase in ("online", "total")]
            sent = _size(peer["bytes_sent_per_party"])
            line += [_ms(peer["seconds"]), str(peer["rounds"]), sent, _error(peer)]
            lines.append(line + [f"{ratio:.1f}x" if ratio else "" for ratio in ratios])
    return header, lines


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms"


def _size(size: float) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 5e4 else f"{size / 1e3:.1f} kB"


def _error(row: Row) -> str:
    error = "not finite" if row["max_abs_error"] is None else f"{row['max_abs_error']:.1e}"
    return error if row["right"] else f"WRONG ({error})"


def brief(row: Row) -> str:
    ours = row["ours"]
    said = [f"failed: {ours['failed']}" if "failed" in ours else f"online {_ms(ours['online']['seconds'])}"]
    if "failed" not in ours:
        said += [f"total {_ms(ours['total']['seconds'])}"]
    for name, peer in row["peers"].items():
        said.append(f"{name} {'failed: ' + peer['failed'] if 'failed' in peer else _ms(peer['seconds'])}")
    return ", ".join(said)


def markdown(report: Row) -> str:
    """The report as a page."""
    on, settings = report["machine"], report["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in on["versions"].items())
    page = [
        "# Single operations, measured",
        "",
        f"Written by `scripts/bench ops --markdown` on {on['date']}: {on['cpu']}, {on['cores']} cores, {on['system']}, "
        f"Python {on['python']}, {versions}. {settings['parties']} parties, medians of {settings['repeat']} runs, all "
        f"systems in turn. Load average {on['load_before']} before, {on['load_after']} after. "
        "What is measured and how: [README.md](README.md).",
    ]
    for title, (header, lines) in tables(report):
        page += ["", f"## {title}", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        page += ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines]
    return "\n".join([*page, ""])


def tables(report: Row) -> list[tuple[str, tuple[list[str], list[list[str]]]]]:
    """What is shown, with titles."""
    parties = report["settings"]["parties"]
    shown = [(f"mpcinfer, {parties} parties", our_table(report))]
    if report["ops"][0]["peers"]:
        shown.append((f"Other systems, {parties} parties", peer_table(report)))
    return shown
