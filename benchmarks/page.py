"""Updates docs/benchmarks.md from the stored runs: pictures and tables come from the JSON files.

The text of the page is written by hand and holds no figure. What stands between
`<!-- results: NAME -->` and `<!-- end -->` is written here.
"""

import itertools
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks import plots
from benchmarks.harness import ROOT, format_cell, read_report

RESULTS = ROOT / "benchmarks" / "results"
"""The runs that are kept."""

PAGE = ROOT / "docs" / "benchmarks.md"
"""Where they are shown; the pictures lie beside it."""

_MARKED = re.compile(r"(?<=<!-- results: )(\w+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)

_Table = tuple[Sequence[str], Sequence[Sequence[Any]]]


def refresh() -> list[pathlib.Path]:
    """Redraws all pictures and rewrites all tables of the page.

    Returns:
      The files written.
    """
    written = []
    for path in sorted(RESULTS.glob("*.json")):
        written.append(PAGE.with_name(f"{path.stem}.png"))
        plots.save(read_report(path), written[-1])
    PAGE.write_text(render(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
    return [*written, PAGE]


def render(text: str) -> str:
    """Returns the page with what the stored runs say in its marked places.

    Args:
      text: The page.
    """
    return _MARKED.sub(lambda match: match[1] + match[2] + _results(match[1]), text)


def _results(name: str) -> str:
    paths = sorted(RESULTS.glob(f"{name}-*.json"))
    if not paths:
        return "\nNo run of it is kept here yet.\n\n"
    return "".join(_section(path) for path in paths)


def _section(path: pathlib.Path) -> str:
    """Returns the picture, the table and the particulars of one run."""
    report = read_report(path)
    tables = _TABLES[report["benchmark"]](report["figures"])
    environment = report["environment"]
    loads = [environment[key] for key in ("load_average_before", "load_average")]
    load = "unknown" if None in loads else f"{loads[0][0]:.1f} before, {loads[1][0]:.1f} after"
    versions = ", ".join(f"{name} {version}" for name, version in environment["versions"].items())
    lines = [
        "",
        f"![{path.stem}]({path.stem}.png)",
        "",
        *itertools.chain.from_iterable(_markdown(*table) for table in tables),
        f"{plots.machine(environment)}; {environment['time'][:10]}; commit "
        f"{environment['commit'][:12]}; load {load}; {versions}; "
        f"[`{path.name}`](../benchmarks/results/{path.name})",
        "",
    ]
    return "\n".join(lines) + "\n"


def _markdown(headers: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    is_number = [
        all(isinstance(x, int | float) for x in column) for column in zip(*rows, strict=True)
    ]
    lines = [headers, ["---:" if right else "---" for right in is_number]]
    lines += [[format_cell(x) for x in row] for row in rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def _columns(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> _Table:
    """Returns some columns of figures as a table, under other names."""
    return list(names.values()), [[row.get(key, "") for key in names] for row in rows]


def _allocator_tables(figures: Any) -> list[_Table]:
    names = {
        "operation": "operation",
        "blocks": "blocks in the pool",
        "median_us": "µs in a burst",
        "empty_us": "empty program, µs",
        "times_empty": "times empty",
        "waited_us": "µs waited for",
        "undonated_us": "µs undonated",
    }
    if "maxtext_us" in figures[0]:
        names["maxtext_us"] = "MaxText, µs"
    return [_columns(figures, names)]


def _attention_tables(figures: Any) -> list[_Table]:
    names = {
        "heads": "query / KV heads / dimension",
        "dtype": "dtype",
        "contestant": "contestant",
        "median_ms": "ms",
        "ratio": "times paged",
        "gigabytes_per_second": "GB/s",
        "of_read": "of a plain read",
    }
    return [_columns(figures, names)]


def _gpu_attention_tables(figures: Any) -> list[_Table]:
    cells: dict[tuple[Any, ...], dict[str, Any]] = {}
    for row in figures["figures"]:
        case = (row["heads"], row["rows"], row["context"])
        cells.setdefault(case, {})[row["contestant"]] = row.get("of_copy", "")
    contestants = list(dict.fromkeys(row["contestant"] for row in figures["figures"]))
    headers = ("heads", "sequences", "context", *contestants)
    rows = [[*case, *(row.get(name, "") for name in contestants)] for case, row in cells.items()]
    return [(headers, rows)]


def _compression_tables(figures: Any) -> list[_Table]:
    rows = figures["methods"]
    names = {
        "method": "method",
        "asked": "ratio asked",
        "ratio": "ratio",
        "kept_tokens": "tokens kept",
        "freed_mib": "MiB freed",
        "seconds": "seconds",
        "attention_error": "attention error",
        "perplexity": "perplexity",
        "times_plain": "times uncompressed",
        "standard_error": "±",
        "agreement": "agreement",
        "own_agreement": "agreement, own text",
        "same_tokens": "tokens until they differ",
    }
    fitted_names = {
        "method": "of tokens dropped and fitted",
        "ratio": "ratio",
        "pruning_error": "attention error, dropped",
        "attention_error": "fitted",
        "plain_times_plain": "times uncompressed, dropped",
        "times_plain": "fitted ",
        "plain_agreement": "agreement, dropped",
        "agreement": " fitted",
    }
    dropped = {(row["method"], row["asked"]): row for row in rows}
    fitted = [
        row | {f"plain_{key}": value for key, value in of_same.items()}
        for row in rows
        if (of_same := dropped.get((row["method"].removesuffix(", fitted"), row["asked"])))
        and of_same is not row
    ]
    tables = [_columns(rows, names)]
    return [*tables, _columns(fitted, fitted_names)] if fitted else tables


def _generate_tables(figures: Any) -> list[_Table]:
    return [_columns(figures, {key: key for key in figures[0]})]


def _prefix_tables(figures: Any) -> list[_Table]:
    calls = [(name, us, "this run") for name, us in figures["lookup_us"].items()]
    calls += [(name, us, "elsewhere") for name, us in figures["elsewhere_us"].items()]
    names = {
        "prefixes": "cached prefixes",
        "kind": "which are",
        "hit_us": "hit, µs",
        "request_us": "whole request, µs",
        "evict_us": "evict a block, µs",
    }
    return [
        (("a prompt of 4,096 cached tokens", "µs", "measured"), calls),
        _columns(figures["growth"], names),
    ]


def _replay_tables(figures: Any) -> list[_Table]:
    headers = ["blocks found, %", *(f"{capacity:,}" for capacity in figures["capacities"])]
    rates = figures["hit_rates"].items()
    return [(headers, [[name, *(100 * rate for rate in row)] for name, row in rates])]


def _tiers_tables(figures: Any) -> list[_Table]:
    names = {
        "leg": f"{figures['num_bytes'] >> 20} MiB",
        "median_ms": "ms",
        "gib_per_second": "GiB/s",
        "times_yardstick": "times yardstick",
        "min_times_yardstick": "at best",
        "yardstick": "yardstick",
        "peak_growth_mib": "peak growth, MiB",
    }
    return [_columns(figures["legs"], names)]


def _groups_tables(figures: Any) -> list[_Table]:
    decode = {
        "context": "tokens per row",
        "groups MiB": "groups, MiB",
        "one group MiB": "one group, MiB",
        "dense MiB": "dense, MiB",
        "bytes of one group": "bytes, of one group",
        "groups ms": "groups, ms per step",
        "time of one group": "time, of one group",
        "time of dense": "time, of dense",
    }
    operations = {
        "tables": "tables",
        "median_us": "µs per call",
        "times one group": "times one group",
        "min times one group": "at best",
    }
    return [_columns(figures["decode"], decode), _columns(figures["operations"], operations)]


def _serve_tables(figures: Any) -> list[_Table]:
    tables = (figures.get(name) for name in ("workloads", "stream", "samples", "products"))
    return [_columns(rows, {name: name for name in rows[0]}) for rows in tables if rows]


def _rollout_tables(figures: Any) -> list[_Table]:
    rows = figures["contestants"]
    return [_columns(rows, {name: name for name in rows[0]})]


_TABLES: Mapping[str, Callable[[Any], list[_Table]]] = {
    "allocator": _allocator_tables,
    "attention": _attention_tables,
    "compression": _compression_tables,
    "generate": _generate_tables,
    "gpu_attention": _gpu_attention_tables,
    "groups": _groups_tables,
    "prefix": _prefix_tables,
    "replay": _replay_tables,
    "rollout": _rollout_tables,
    "serve": _serve_tables,
    "tiers": _tiers_tables,
}
