"""What scripts/bench shows: a report (see bench_run.py, bench_accuracy.py, ...) as tables for a terminal or a page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
Table = tuple[list[str], list[list[str]]]  # a header and lines

SLACK, SMALL = 1.02, 10_000  # of growth: a factor that is rounding, and bytes whose growth says nothing


_RATES = {
    "tokens_per_second": "tokens/s",
    "requests_per_second": "requests/s",
    "cpu_seconds_per_request": "CPU seconds per request, all processes",
}


def our_table(rows: list[Row]) -> Table:
    """Our results: a header and a line per workload."""
    header = ["workload", "online", "offline", "total", "rounds", "sent per party", "sent by dealer", "max error"]
    lines = []
    for row in rows:
        ours = row["ours"]
        if "failed" in ours:
            lines.append([row["name"], f"failed: {ours['failed']}", *[""] * 6])
            continue
        online, offline, total = ours["online"], ours["offline"], ours["total"]
        sent = _size(online["bytes_sent_per_party"]), _size(offline["bytes_sent_by_dealer"])
        times = [_ms(phase["seconds"]) for phase in (online, offline, total)]
        lines.append([row["name"], *times, f"{online['rounds']:.0f}", *sent, _error(ours)])
    lines = [line + _resources(row["ours"]) for line, row in zip(lines, rows, strict=True)]
    header += ["deploy", "memory, party / dealer"]
    for key, title in _RATES.items():
        rates = [row["ours"].get(key) for row in rows]
        if any(rates):
            header.append(title)
            lines = [[*line, f"{rate:.2f}" if rate else ""] for line, rate in zip(lines, rates, strict=True)]
    return header, lines


def _resources(ours: Row) -> list[str]:
    if "failed" in ours:
        return ["", ""]
    memory = ours["peak_rss_bytes"]
    return [f"{ours['deploy_seconds']:.2f} s", f"{memory['party'] / 1e6:.0f} / {memory['dealer'] / 1e6:.0f} MB"]


def peer_table(rows: list[Row]) -> Table:
    """A header and a line per workload and peer."""
    header = ["workload", "system", "variant", "total", "rounds", "sent per party", "max error"]
    header += ["our online is faster by", "our total is faster by"]
    lines = []
    for row in rows:
        for name, peer in row["peers"].items():
            line = [row["name"], name, peer["variant"]]
            if "failed" in peer:
                lines.append([*line, f"failed: {peer['failed']}", *[""] * 5])
                continue
            ratios = [row["ratios"].get(f"{phase}_vs_{name}_total") for phase in ("online", "total")]
            sent = _size(peer["bytes_sent_per_party"])
            misread = f"; its own decoder misreads {peer['misread']:,}" if peer.get("misread") else ""
            line += [_ms(peer["seconds"]), str(peer["rounds"]), sent, _error(peer) + misread]
            lines.append(line + [f"{ratio:.1f}x" if ratio else "" for ratio in ratios])
    return header, lines


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f} ms" if seconds < 10 else f"{seconds:,.1f} s"


def _size(size: float) -> str:
    return f"{size / 1e6:.2f} MB" if size >= 5e4 else f"{size / 1e3:.1f} kB"


def _error(row: Row) -> str:
    if "verdict" in row:
        return row["verdict"] if row["right"] else f"WRONG ({row['verdict']})"
    error = "not finite" if row["max_abs_error"] is None else f"{row['max_abs_error']:.1e}"
    if row.get("cosine") is not None:
        error += f", cosine {row['cosine']:.7f}"
    return error if row["right"] else f"WRONG ({error})"


def brief(row: Row) -> str:
    ours = row["ours"]
    said = [f"failed: {ours['failed']}" if "failed" in ours else f"online {_ms(ours['online']['seconds'])}"]
    if "failed" not in ours:
        said += [f"total {_ms(ours['total']['seconds'])}"]
    for name, peer in row["peers"].items():
        said.append(f"{name} {'failed: ' + peer['failed'] if 'failed' in peer else _ms(peer['seconds'])}")
    return ", ".join(said)


def growth_table(rows: list[Row]) -> Table:
    """By which factors the steps grow along one axis."""
    first, last = rows[0]["size"], rows[-1]["size"]
    header = ["step", f"bytes to a party, {first} to {last}", "bytes of the dealer", "work in plaintext"]
    lines = [
        [step, *(f"{factor:.2f}x" for factor in (sent, dealt, work)), "no" if slow else "YES"]
        for step, sent, dealt, work, slow in growth(rows)
    ]
    return [*header, "faster than plaintext"], lines


def growth(rows: list[Row]) -> list[tuple[str, float, float, float, bool]]:
    """Of the rows of one axis, for each step: by how much its bytes to a party, the dealer's, and its work in plaintext
    grow from the smallest size to the largest, and whether its bytes grow no faster than that from each to the next."""
    found = []
    for step, first in rows[0]["steps"].items():
        sizes = [row["steps"][step] for row in rows]
        slow = all(
            after[what] <= SLACK * before[what] * max(1.0, after["plain"] / before["plain"]) or after[what] < SMALL
            for before, after in zip(sizes, sizes[1:], strict=False)
            for what in ("online", "dealer")
        )
        sent, dealt, work = (
            sizes[-1][what] / first[what] if first[what] else 1.0 for what in ("online", "dealer", "plain")
        )
        found.append((step, sent, dealt, work, slow))
    return found


# --- accuracy ---------------------------------------------------------------------------------------------------------


def points_table(report: Row) -> Table:
    """What is evaluated where, and how exact it has to be."""
    lines = [[row["name"], row["tolerance"], *row["points"].values()] for row in report["functions"]]
    return ["function", "tolerance", "ordinary points", "wide points"], lines


def our_accuracy(report: Row, parties: int) -> Table:
    """Our results: a line per function and range."""
    header = ["function", "range", "points", "max error", "max relative", "in tolerances", "worst at x", "verdict"]
    lines = []
    for row in report["functions"]:
        found = row["parties"][str(parties)]
        ours = found["systems"]["mpcinfer"]
        for within in row["points"]:
            if within not in ours:
                lines.append([row["name"], within, *[""] * 5, _missing(ours, within), ""])
                continue
            of = ours[within]
            relative = "" if of["max_relative_error"] is None else _figure(of["max_relative_error"])
            line = [row["name"], within, f"{of['points']:,}", _figure(of["max_abs_error"]), relative]
            line += [_figure(of["max_error_in_tolerances"]), f"{of['worst']['x']:.6g}"]
            ahead = [(name, measure) for name, where, measure in map(str.split, found["behind"]) if where == within]
            by = ", ".join(f"{name} ({measure.split('_')[1]})" for name, measure in ahead)
            lines.append([*line, "right" if of["right"] else "WRONG", f"no: {by}" if by else "yes"])
    return [*header, "most exact of the right"], lines


def all_accuracy(report: Row, parties: int) -> Table:
    """The largest errors of all systems, a line per function and range."""
    systems = ["mpcinfer", *report["settings"]["peers"]]
    lines = []
    for row in report["functions"]:
        found = row["parties"][str(parties)]["systems"]
        for within in row["points"]:
            cells = [_errors(found[name], within) for name in systems]
            lines.append([row["name"], within, *cells])
    return ["function", "range", *systems], lines


def _errors(result: Row, within: str) -> str:
    if within not in result:
        return _missing(result, within)
    of = result[within]
    relative = f", {_figure(of['max_relative_error'])} relative" if of["max_relative_error"] is not None else ""
    return f"{'' if of['right'] else 'WRONG '}{_figure(of['max_abs_error'])}{relative}"


def _missing(result: Row, within: str) -> str:
    """Why there is no result, in full the first time."""
    reason = said(result)
    return reason if within == "ordinary" else reason.partition(":")[0]


def _figure(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.1e}" if value and not 0.01 <= value < 100 else f"{value:.2f}"


def said(result: Row) -> str:
    """A verdict on both ranges, in a word or a sentence."""
    for reason in ("refused", "failed"):
        if reason in result:
            return f"{reason}: {result[reason]}"
    if "absent" in result:
        return "not run"
    return "has none" if "lacks" in result else "right" if result["right"] else "WRONG"


# --- all --------------------------------------------------------------------------------------------------------------

_TITLES = {
    "ops": "Single operations, measured",
    "models": "Models, measured",
    "peers": "This system beside others, measured",
    "generate": "Language models, measured",
    "together": "Requests at the same time, measured",
    "growth": "Growth, measured",
}


def right(report: Row) -> bool:
    """Whether all our results are there and right."""
    if "rows" in report:
        axes: dict[tuple[str, str], list[Row]] = {}
        for row in report["rows"]:
            if "axis" in row:
                axes.setdefault((row["network"], row["axis"]), []).append(row)
        slow = all(slow for rows in axes.values() for *_, slow in growth(rows))
        return slow and all(row["ours"].get("right") for row in report["rows"])
    return all(
        found["systems"]["mpcinfer"].get("right") for row in report["functions"] for found in row["parties"].values()
    )


def markdown(report: Row, plots: Sequence[str] = ()) -> str:
    """The report as a page, with `plots`: names of pictures beside it."""
    on, settings = report["machine"], report["settings"]
    versions = ", ".join(f"{name} {number}" for name, number in on["versions"].items())
    machine = f"{on['cpu']}, {on['cores']} cores, {on['system']}, Python {on['python']}, {versions}"
    if "rows" in report:
        page = [
            f"# {_TITLES[report['command']]}",
            "",
            f"Written by `scripts/bench {report['command']} --markdown` on {on['date']}: {machine}. "
            f"Medians of {settings['repeat']} runs, all systems in turn. Load average {on['load_before']} before, "
            f"{on['load_after']} after. What is measured and how: [README.md](README.md).",
            *_networks(report),
        ]
        if settings.get("tiny"):
            page += ["", "**Tiny inputs and models, whatever they are called: these figures say nothing of costs.**"]
    else:
        page = [
            "# Functions: how exact",
            "",
            f"Written by `scripts/bench accuracy --markdown` on {on['date']}: {machine}. Another system is right "
            f"if it is within {settings['peer_slack']:g} tolerances on both ranges; ours has to be within one. "
            "What is compared and how: [README.md](README.md#accuracy).",
        ]
    for plot in plots:
        page += ["", f"![{plot.rpartition('.')[0]}]({plot})"]
    for title, (header, lines) in tables(report):
        page += ["", f"## {title}", "", "| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
        page += ["| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in lines]
    return "\n".join([*page, ""])


def _networks(report: Row) -> list[str]:
    """What the relays' networks were when they were measured, before the runs."""
    lines = []
    for name, found in report["networks"].items():
        if found:
            trip, rate = 1e3 * found["round_trip"], found["bandwidth"] / 1e6
            lines.append(f"- {name}: a round trip took {trip:.2f} ms, and {rate:,.0f} Mbit/s went through")
    return ["", "Measured of the networks before:", "", *lines] if lines else []


def tables(report: Row) -> list[tuple[str, Table]]:
    """What is shown, with titles."""
    parties, shown = report["settings"]["parties"], []
    if "rows" in report:
        for network in report["networks"]:
            rows = [row for row in report["rows"] if row["network"] == network]
            shown += _of_network(rows, f"{parties} parties, {network}")
        return shown
    shown = [("Points and tolerances", points_table(report))]
    for n in parties:
        shown.append((f"mpcinfer, {n} parties", our_accuracy(report, n)))
        if report["settings"]["peers"]:
            shown.append((f"Largest errors, {n} parties", all_accuracy(report, n)))
    return shown


def _of_network(rows: list[Row], where: str) -> list[tuple[str, Table]]:
    if not rows:
        return []
    shown = [(f"mpcinfer, {where}", our_table(rows))]
    if rows[0]["peers"]:
        shown.append((f"Other systems, {where}", peer_table(rows)))
    for axis in dict.fromkeys(row["axis"] for row in rows if "axis" in row):
        shown.append((f"Growth with {axis}, bytes", growth_table([row for row in rows if row["axis"] == axis])))
    return shown
