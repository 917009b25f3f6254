"""Pictures of the reports of scripts/bench, SVG, beside their pages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench_report import Row

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_OURS = (("mpcinfer online", "online", "tab:green"), ("mpcinfer total", "total", "tab:olive"))
_COLOURS = {
    "spu": "tab:blue",
    "crypten": "tab:orange",
    "prix-lut": "tab:red",
    "prix-shaft": "tab:pink",
    "prix-crypten": "tab:purple",
}


def plot(report: Row, page: Path) -> list[str]:
    """The pictures of a report, written beside its page: their names."""
    if "rows" not in report or report["command"] == "ops":
        return []
    made: list[str] = []
    for network in report["networks"]:
        rows = [row for row in report["rows"] if row["network"] == network]
        if report["command"] == "growth":
            for axis in dict.fromkeys(row["axis"] for row in rows):
                picked = [row for row in rows if row["axis"] == axis]
                made.append(_draw(page, f"{network}-{axis}", 2, lambda axes, r=picked: _growth(axes, r)))
        elif rows:
            made.append(_draw(page, network, 1, lambda axes, r=rows: _bars(axes[0], r, report["settings"]), len(rows)))
    return made


def _draw(page: Path, name: str, columns: int, fill: Callable[[list[Axes]], None], rows: int = 0) -> str:
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "mpcinfer"  # the same picture is the same file
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, columns, figsize=(10, max(4.0, 0.7 * rows + 1.5)), squeeze=False)
    fill(list(axes[0]))
    figure.tight_layout()
    file = page.with_name(f"{page.stem}-{name}.svg")
    figure.savefig(file, metadata={"Date": None})
    pyplot.close(figure)
    return file.name


def _bars(axes: Axes, rows: list[Row], settings: Row) -> None:
    """Seconds of every system, a group of bars for each workload; what is wrong is hollow."""
    systems = [*(label for label, _, _ in _OURS), *settings.get("peers", [])]
    height = 0.8 / len(systems)
    for i, row in enumerate(rows):
        for j, (seconds, right, colour) in enumerate(_bar(row, system) for system in systems):
            if seconds is None:
                continue
            at, style = i + j * height, {"color": colour} if right else {"fill": False, "edgecolor": colour}
            axes.barh(at, seconds, height, log=True, **style)
            if not right:
                axes.annotate(" wrong", (seconds, at), va="center", fontsize=6)
    for system in systems:
        axes.barh(0, 0, color=_colour(system), label=system)
    axes.set_yticks([i + 0.4 - height / 2 for i in range(len(rows))], [row["name"] for row in rows])
    axes.invert_yaxis()
    shown = [seconds for row in rows for seconds, _, _ in (_bar(row, system) for system in systems) if seconds]
    axes.set_xlim(left=min(shown, default=1.0) / 2)
    axes.set_xlabel("seconds, median")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(fontsize=7, loc="best")


def _colour(system: str) -> str:
    return next((colour for label, _, colour in _OURS if label == system), _COLOURS.get(system, "tab:gray"))


def _bar(row: Row, system: str) -> tuple[float | None, bool, str]:
    """Seconds, or None if there are none; whether they are of a right result; the colour."""
    phase = next((phase for label, phase, _ in _OURS if label == system), None)
    result = row["ours"] if phase else row["peers"].get(system, {"failed": "not run"})
    if "failed" in result:
        return None, False, _colour(system)
    return (result[phase]["seconds"] if phase else result["seconds"]), bool(result["right"]), _colour(system)


def _growth(axes: list[Axes], rows: list[Row]) -> None:
    """Seconds and bytes against the size, and a line with the slope of the work in plaintext."""
    sizes = [row["size"] for row in rows]
    work = [sum(step["plain"] for step in row["steps"].values()) for row in rows]

    def line(on: Axes, label: str, values: list[float], **style: Any) -> None:
        on.plot(sizes, values, label=label, **({"marker": "o"} | style))

    time, size = axes
    for phase in ("online", "offline"):
        line(time, phase, [row["ours"][phase]["seconds"] for row in rows])
    line(time, "plaintext", [row["plain_seconds"] for row in rows])
    line(size, "sent by a party", [row["ours"]["online"]["bytes_sent_per_party"] / 1e6 for row in rows])
    line(size, "sent by the dealer", [row["ours"]["offline"]["bytes_sent_by_dealer"] / 1e6 for row in rows])
    for on, first in (
        (time, rows[0]["ours"]["online"]["seconds"]),
        (size, rows[0]["ours"]["online"]["bytes_sent_per_party"] / 1e6),
    ):
        line(
            on, "as the work in plaintext", [first * w / work[0] for w in work], linestyle=":", marker="", color="gray"
        )
        on.set_xlabel(rows[0]["axis"])
        on.set_xscale("log", base=2)
        on.set_yscale("log")
        on.set_xticks(sizes, [str(s) for s in sizes])
        on.grid(alpha=0.3)
        on.legend(fontsize=7)
    time.set_ylabel("seconds, median")
    size.set_ylabel("MB")
