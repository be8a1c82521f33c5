"""Draws a benchmark's report, from what its JSON file holds and nothing else."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MISSING = "Pictures are drawn with matplotlib, which is not installed: pip install matplotlib."

_Rows = Sequence[Mapping[str, Any]]
_OURS, _OTHER, _YARDSTICK = "tab:blue", "tab:gray", "black"


def is_available() -> bool:
    """Returns whether matplotlib is there to draw with."""
    return importlib.util.find_spec("matplotlib") is not None


def machine(environment: Mapping[str, Any]) -> str:
    """Returns the device of a report in words: for a CPU its model and number."""
    platform, _, kind = environment["device"].partition(": ")
    if platform == "cpu":
        return f"{environment['cpu']}, {environment['num_cpus']} cores"
    return kind


def draw(report: Mapping[str, Any]) -> Figure:
    """Draws a report.

    Args:
      report: What `harness.read_report` returns.

    Raises:
      ValueError: If there is no picture of such figures.
    """
    name, environment = report["benchmark"], report["environment"]
    if name not in _DRAWINGS:
        raise ValueError(f"There is no picture of {name!r}, only of {', '.join(_DRAWINGS)}.")
    figure: Figure = importlib.import_module("matplotlib.figure").Figure(layout="constrained")
    title = _DRAWINGS[name](figure, report["figures"])
    quick = ", a quick run" if report["options"].get("quick") else ""
    figure.suptitle(f"{title}\n{machine(environment)}, {environment['time'][:10]}{quick}")
    return figure


def save(report: Mapping[str, Any], path: str | os.PathLike[str]) -> None:
    """Draws a report into a file.

    Args:
      report: As for `draw`.
      path: Its end says which format: ".png", ".svg", ...
    """
    draw(report).savefig(path, dpi=120)


def _draw_allocator(figure: Figure, figures: _Rows) -> str:
    figure.set_size_inches(11, 4.5)
    burst, alone = figure.subplots(1, 2)
    for operation, rows in _grouped(figures, "operation"):
        (line,) = burst.plot(*_points(rows, "blocks", "median_us"), "o-", label=operation)
        color = line.get_color()
        alone.plot(*_points(rows, "blocks", "waited_us"), "o-", color=color, label=operation)
        others = {"undonated_us": ("^--", "undonated"), "maxtext_us": ("s:", "MaxText")}
        for key, (style, label) in others.items():
            if key in rows[0]:
                points = _points(rows, "blocks", key)
                alone.plot(*points, style, color=color, label=f"{operation}, {label}")
    sizes, empty = _points(_grouped(figures, "operation")[0][1], "blocks", "empty_us")
    burst.plot(sizes, empty, "k--", label="empty program")
    burst.set_title("calls in a burst, state donated")
    alone.set_title("every call waited for")
    for axes in (burst, alone):
        axes.set(xlabel="blocks in the pool", ylabel="time of a call (µs)")
        _size_axis(axes, sizes)
        axes.set_ylim(bottom=0)
        _finish(axes)
    if "maxtext_us" in figures[0]:
        alone.set(yscale="log")
    return "Allocation"


def _draw_attention(figure: Figure, figures: _Rows) -> str:
    shapes = _grouped(figures, "heads", "dtype")
    figure.set_size_inches(8, 1 + 0.35 * len(figures) + 0.8 * len(shapes))
    for axes, (shape, rows) in zip(_column(figure, len(shapes)), shapes, strict=True):
        speeds = {row["contestant"]: row["gigabytes_per_second"] for row in rows}
        roofs = {name: speeds.pop(name) for name in ("plain read", "plain copy") if name in speeds}
        _bars(axes, speeds, ours="paged", roofs=roofs)
        axes.set_title("{} query and {} KV heads of {}, {}".format(*shape[0].split("/"), shape[1]))
        axes.set(xlabel="keys and values read (GB/s)", ylabel="contestant")
        axes.grid(axis="x", alpha=0.3)
    _shared_legend(figure, num_columns=4)
    return "A decoding step of attention"


def _draw_gpu_attention(figure: Figure, figures: Mapping[str, Any]) -> str:
    rows = [row for row in figures["figures"] if row.get("gigabytes_per_second") is not None]
    if not rows or "contestant" not in rows[0]:
        raise ValueError("There is no picture of --tune, nor of a run in which all failed.")
    colors = {name: f"C{i}" for i, name in enumerate(_values(rows, "contestant"))}
    heads, contexts = _values(rows, "heads"), sorted(_values(rows, "context"))
    figure.set_size_inches(1.5 + 4 * len(contexts), 1.5 + 3.2 * len(heads))
    grid = figure.subplots(len(heads), len(contexts), squeeze=False, sharex=True)
    roof = figures["copy_bytes_per_second"][0] / 1e9
    for (i, name), (j, context) in itertools.product(enumerate(heads), enumerate(contexts)):
        axes = grid[i, j]
        shown = [row for row in rows if (row["heads"], row["context"]) == (name, context)]
        for contestant, of_it in _grouped(shown, "contestant"):
            width = 3.0 if contestant == "ferrum_jax" else 1.5
            style = {"color": colors[contestant], "linewidth": width, "label": contestant}
            axes.plot(*_points(of_it, "rows", "gigabytes_per_second"), "o-", **style)
        axes.axhline(roof, color=_YARDSTICK, linestyle="--", label="plain copy, read + written")
        axes.set_title(f"heads {name}, contexts up to {context:,}")
        axes.set(xlabel="sequences", ylabel="keys and values read (GB/s)")
        _size_axis(axes, sorted(_values(shown, "rows")))
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
    _shared_legend(figure, num_columns=2 * len(contexts))
    return "A decoding step of attention"


def _draw_compression(figure: Figure, figures: Mapping[str, Any]) -> str:
    figure.set_size_inches(13, 10)
    rows = [row for row in figures["methods"] if "format" in row]
    grid = figure.subplots(2, 2, sharex=True, sharey="row")
    heights = {"times_plain": "perplexity, times uncompressed", "agreement": "agreement"}
    titles = "tokens dropped, the others as they were", "fewer bits, and then tokens dropped"
    for column, title in enumerate(titles):
        shown = [row for row in rows if row["method"].startswith("Native") is (column == 0)]
        for axes, (key, label) in zip(grid[:, column], heights.items(), strict=True):
            _compression_lines(axes, shown, key, parts_of_color=2 - column)
            axes.set(xlabel="bytes, times uncompressed", ylabel=label, title=title, xlim=(0, 1))
            _finish(axes)
            axes.legend(fontsize=8, loc="upper right" if key == "times_plain" else "lower right")
    grid[0, 0].set_ylim(bottom=0.98)
    return "A model's text through a compressed cache"


def _compression_lines(axes: Axes, rows: _Rows, key: str, parts_of_color: int) -> None:
    """Draws a line for each method; names with the same first parts share a color."""
    families: dict[tuple[str, ...], int] = {}
    for number, (method, of_it) in enumerate(_grouped(rows, "method")):
        family = tuple(method.split(", ")[:parts_of_color])
        num_before = families.get(family, 0)
        families[family] = num_before + 1
        style = "os^vDPX*"[number % 8] + ("-", "--", ":")[num_before]
        color = f"C{list(families).index(family)}"
        axes.plot(*_points(of_it, "ratio", key), style, color=color, alpha=0.7, label=method)
    axes.axhline(1.0, color=_YARDSTICK, linestyle=":", label="uncompressed")


def _draw_generate(figure: Figure, figures: _Rows) -> str:
    figure.set_size_inches(11, 4.5)
    speed, memory = figure.subplots(1, 2)
    labels = ["{}\n{}\nbatch {}".format(*r["contexts"].split(" "), r["batch"]) for r in figures]
    for axes, unit, ylabel in (
        (speed, " tokens/s", "decoded tokens/s"),
        (memory, " MiB", "cache (MiB)"),
    ):
        caches = [key.removesuffix(unit) for key in figures[0] if key.endswith(unit)]
        width = 0.8 / len(caches)
        for i, cache in enumerate(caches):
            places = [x + (i + 0.5) * width - 0.4 for x in range(len(figures))]
            color = _OTHER if cache == "dense" else None
            heights = [row[cache + unit] for row in figures]
            axes.bar(places, heights, width, label=cache, color=color)
        axes.set_xticks(range(len(labels)), labels, fontsize=8)
        axes.set(xlabel="tokens in each sequence", ylabel=ylabel)
        _finish(axes, grid="y")
    return f"A whole model, its cache in {figures[0]['dtype']}"


def _draw_groups(figure: Figure, figures: Mapping[str, Any]) -> str:
    figure.set_size_inches(11, 4.5)
    memory, speed = figure.subplots(1, 2)
    rows = figures["decode"]
    for axes, unit, ylabel in ((memory, " MiB", "live cache (MiB)"), (speed, " ms", "ms per step")):
        for cache, color in (("groups", _OURS), ("one group", _YARDSTICK), ("dense", _OTHER)):
            heights = [row[cache + unit] for row in rows]
            axes.plot([row["context"] for row in rows], heights, "o-", color=color, label=cache)
        axes.set(xlabel="tokens in each of the rows", ylabel=ylabel, xscale="log", yscale="log")
        _finish(axes, grid="both")
    return f"Layers of Gemma 3 270M, {rows[0]['rows']} rows: windows that free their blocks"


def _draw_prefix(figure: Figure, figures: Mapping[str, Any]) -> str:
    figure.set_size_inches(13, 4.5)
    once, growth = figure.subplots(1, 2)
    calls = figures["lookup_us"] | figures["elsewhere_us"]
    colors = [_OURS] * len(figures["lookup_us"]) + [_OTHER] * len(figures["elsewhere_us"])
    bars = once.barh(list(calls), list(calls.values()), color=colors)
    once.bar_label(bars, fmt="%.3g", padding=2)
    once.legend(
        [bars[0], bars[-1]], ["this run", "measured elsewhere"], loc="upper right", fontsize=8
    )
    once.set_title("a cached prompt of 4,096 tokens")
    once.set(xscale="log", xlabel="median time (µs)", ylabel="operation")
    once.set_xlim(right=10 * max(calls.values()))
    once.invert_yaxis()
    names = {"hit_us": "hit", "request_us": "whole request", "evict_us": "evict a block"}
    for kind, rows in _grouped(figures["growth"], "kind"):
        style = "o-" if kind == "unlike" else "s--"
        for color, (key, name) in zip(("C0", "C1", "C2"), names.items(), strict=True):
            points = _points(rows, "prefixes", key)
            growth.plot(*points, style, color=color, label=f"{name}, {kind}")
    growth.set_title("among others")
    growth.set(xlabel="cached prefixes of four blocks", ylabel="median time (µs)")
    _size_axis(growth, _values(figures["growth"], "prefixes"))
    growth.set_ylim(bottom=0)
    _finish(growth)
    return "The prefix cache"


def _draw_rollout(figure: Figure, figures: Mapping[str, Any]) -> str:
    figure.set_size_inches(10, 3)
    rows = figures["contestants"]
    for axes, key, label in zip(
        figure.subplots(1, 2),
        ("tokens/s", "peak cache, MiB"),
        ("new tokens/s", "peak of the cache (MiB)"),
        strict=True,
    ):
        _bars(axes, {row["contestant"]: row[key] for row in rows}, ours="rollout", roofs={})
        axes.set(xlabel=label, ylabel="contestant")
        axes.grid(axis="x", alpha=0.3)
    _shared_legend(figure, num_columns=2)
    return "8 samples of 8 prompts"


def _draw_serve(figure: Figure, figures: Mapping[str, Any]) -> str:
    figure.set_size_inches(11, 4.5)
    workloads, kinds = dict(_grouped(figures["workloads"], "workload")), dict[str, Any]()
    for axes, (kind, rows) in zip(
        figure.subplots(1, len(workloads), squeeze=False)[0], workloads.items(), strict=True
    ):
        ours, roof = ("engine", "engine, exact", "serve"), "floor"
        colors = [
            _OURS if row["engine"] in ours else _YARDSTICK if row["engine"] == roof else _OTHER
            for row in rows
        ]
        bars = axes.barh([row["engine"] for row in rows], _values(rows, "tokens/s"), color=colors)
        axes.bar_label(bars, fmt="%.0f", padding=2)
        axes.set(title=f"{kind} prompts", xlabel="new tokens/s", ylabel="engine")
        axes.margins(x=0.1)
        axes.invert_yaxis()
        kinds = dict(zip(colors, bars, strict=True))
    names = {_OURS: "ours", _OTHER: "others", _YARDSTICK: "the model's products alone"}
    labels = [names[color] for color in kinds]
    figure.legend(kinds.values(), labels, loc="outside lower center", ncols=3, fontsize=8)
    return "32 requests at once; the floor is the model's products alone"


def _draw_tiers(figure: Figure, figures: Mapping[str, Any]) -> str:
    legs = figures["legs"]
    figure.set_size_inches(8, 1.5 + 0.4 * len(legs))
    # A plain copy and a plain file are the roofs, each over legs of its own.
    is_file = [row["yardstick"].endswith("file") for row in legs]
    for axes, on_disk, title in zip(
        _column(figure, 2), (False, True), ("host memory", "disk"), strict=True
    ):
        rows = [row for row, disk in zip(legs, is_file, strict=True) if disk is on_disk]
        speeds = {row["leg"]: row["gib_per_second"] for row in rows}
        yardsticks = [row["yardstick"] for row in rows if row["leg"].startswith("swap")]
        _bars(axes, speeds, ours="swap", roofs={name: speeds[name] for name in yardsticks})
        axes.set_title(f"{figures['num_bytes'] >> 20} MiB, {title}")
        axes.set(xlabel="speed (GiB/s)", ylabel="leg")
        axes.grid(axis="x", alpha=0.3)
    _shared_legend(figure, num_columns=3)
    return "Swapping blocks out and in"


def _draw_replay(figure: Figure, figures: Mapping[str, Any]) -> str:
    figure.set_size_inches(8, 5)
    axes = figure.subplots()
    for marker, (name, rates) in zip(
        itertools.cycle("os^vDPX*"), figures["hit_rates"].items(), strict=False
    ):
        style = "k--" if name == "optimum" else f"{marker}-"
        axes.plot(figures["capacities"], [100 * rate for rate in rates], style, label=name)
    axes.set(xlabel="capacity (blocks)", ylabel="blocks found (%)")
    _size_axis(axes, figures["capacities"])
    axes.set_ylim(bottom=0)
    _finish(axes)
    return f"Block policies on {figures['trace']}, {figures['num_requests']:,} requests"


_DRAWINGS: Mapping[str, Callable[[Figure, Any], str]] = {
    "allocator": _draw_allocator,
    "attention": _draw_attention,
    "compression": _draw_compression,
    "generate": _draw_generate,
    "gpu_attention": _draw_gpu_attention,
    "groups": _draw_groups,
    "prefix": _draw_prefix,
    "replay": _draw_replay,
    "rollout": _draw_rollout,
    "serve": _draw_serve,
    "tiers": _draw_tiers,
}


def _bars(
    axes: Axes, values: Mapping[str, float], *, ours: str, roofs: Mapping[str, float]
) -> None:
    """Draws a bar for each name, downwards; those that begin with `ours` in our color.

    What they are held against stands across all of them.
    """
    for is_ours, label in ((True, "ferrum_jax"), (False, "others")):
        shown = [name.startswith(ours) is is_ours for name in values]
        widths = [value if it else 0.0 for value, it in zip(values.values(), shown, strict=True)]
        color = _OURS if is_ours else _OTHER
        bars = axes.barh(list(values), widths, color=color, label=label)
        labels = [f"{x:.3g}" if it else "" for x, it in zip(widths, shown, strict=True)]
        axes.bar_label(bars, labels, padding=3)
    for (name, value), style in zip(roofs.items(), ("--", ":"), strict=False):
        axes.axvline(value, color=_YARDSTICK, linestyle=style, label=f"yardstick: {name}")
    axes.set_xlim(0, 1.12 * max(*values.values(), *roofs.values()))
    axes.invert_yaxis()


def _size_axis(axes: Axes, sizes: Sequence[int]) -> None:
    """Makes the horizontal axis logarithmic, with the sizes that were measured on it."""
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()


def _finish(axes: Axes, grid: Literal["both", "x", "y"] = "both") -> None:
    axes.grid(axis=grid, alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize=8)


def _shared_legend(figure: Figure, num_columns: int) -> None:
    """Puts one legend for all axes below them."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        list(handles.values()), list(handles), loc="outside lower center", ncols=num_columns
    )


def _column(figure: Figure, num_rows: int) -> list[Axes]:
    return list(figure.subplots(num_rows, 1, squeeze=False)[:, 0])


def _points(rows: _Rows, x: str, y: str) -> tuple[list[Any], list[Any]]:
    """Returns two columns, by the first one's size."""
    points = sorted((row[x], row[y]) for row in rows)
    return [x for x, _ in points], [y for _, y in points]


def _values(rows: _Rows, key: str) -> list[Any]:
    """Returns the different values of a column, in the order in which they come."""
    return list(dict.fromkeys(row[key] for row in rows))


def _grouped(rows: _Rows, *keys: str) -> list[tuple[Any, _Rows]]:
    """Returns rows by the values that they have in some columns, in the order they come."""
    groups: dict[Any, list[Mapping[str, Any]]] = {}
    for row in rows:
        values = tuple(row[key] for key in keys)
        groups.setdefault(values if len(keys) > 1 else values[0], []).append(row)
    return list(groups.items())
