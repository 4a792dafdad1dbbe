"""The paper's tables from files of `trace-sdk evaluate`: 1, 3, 6 and figure 10.

Masks are named by what they are: BASE, as a method wrote them, and BASE+EDGES, refined with some edges. Table 1 is BASE
and BASE+OURS; figure 10 is BASE with every kind of edges; table 3 is BASE with the steps of an ablation in order.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from trace_sdk.errors import DatasetError
from trace_sdk.figures import figure_png, new_figure
from trace_sdk.reports import markdown_table

NOT_MEASURED = "not measured"
_MASKS = ("ap", "ap50", "ap75", "ar100")
_EDGES = ("ods", "ois", "cldice")

Scores = dict[str, dict[str, dict[str, Any]]]  # data set → name → figures


def read_results(folders: Iterable[Path]) -> tuple[Scores, Scores]:
    """Edges and masks of every quality.json under the folders.

    Raises:
        DatasetError: there is none, one is malformed, or two tell different figures of one thing.
    """
    files = sorted({file for folder in folders for file in Path(folder).rglob("quality.json")})
    if not files:
        raise DatasetError(f"No quality.json in {', '.join(map(str, folders))}. Run trace-sdk evaluate first.")
    edges: Scores = {}
    masks: Scores = {}
    origin: dict[tuple[str, str, str], Path] = {}
    for file in files:
        try:
            content = json.loads(file.read_bytes())
            found = [
                (kind, into, dataset, name, {key: float(one[key]) for key in keys})
                for kind, into, keys in (("methods", edges, _EDGES), ("masks", masks, _MASKS))
                for name, row in content.get(kind, {}).items()
                for dataset, one in row.items()
            ]
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise DatasetError(f"{file} is not a result of trace-sdk evaluate ({reason}). Make it again.") from error
        for kind, into, dataset, name, figures in found:
            if into.setdefault(dataset, {}).setdefault(name, figures) != figures:
                raise DatasetError(
                    f"{file} and {origin[kind, dataset, name]} differ about {name} on {dataset}. Remove the older one."
                )
            origin.setdefault((kind, dataset, name), file)
    return edges, masks


def paper_tables(edges: Scores, masks: Scores, ours: str, ablation: Sequence[str]) -> str:
    """Markdown of table 1, table 3, table 6 and figure 10.

    Args:
        edges, masks: as `read_results` gives them.
        ours: name of our edges in BASE+EDGES.
        ablation: names of edges, from the first step to the last; none: table 3 is not made.
    """
    lines = ["# Table 1: masks before and after refinement with our edges", ""]
    lines += _by_dataset(masks, lambda named: _table_1(named, ours))
    lines += ["# Table 3: ablation", ""]
    lines += _by_dataset(masks, lambda named: _by_edges(named, ["", *ablation])) if ablation else [NOT_MEASURED, ""]
    lines += ["# Table 6: instance edges", ""]
    lines += _by_dataset(edges, _table_6)
    lines += ["# Figure 10: other edges in place of ours", ""]
    lines += _by_dataset(masks, lambda named: _by_edges(named, ["", *_edge_names(named, ours)]))
    return "\n".join(lines)


def figure_10(masks: Scores, ours: str) -> bytes | None:
    """PNG: AP of each base without refinement and with every kind of edges, ours darkest; a panel a data set.

    What was not measured has no bar. None if no masks were refined.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    panels = {dataset: named for dataset, named in masks.items() if _edge_names(named, ours)}
    if not panels:
        return None
    most = max(len(_bases(named)) * (2 + len(_edge_names(named, ours))) for named in panels.values())
    figure = new_figure(2 + 0.35 * most, 3.2 * len(panels))
    for axes, (dataset, named) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        bases, kinds = _bases(named), ["", *_edge_names(named, ours)]
        for place, kind in enumerate(kinds):
            values = [named.get(f"{base}+{kind}" if kind else base, {}).get("ap") for base in bases]
            shown = [(at + place / (len(kinds) + 1), value) for at, value in enumerate(values) if value is not None]
            colour = "black" if kind == ours else f"{0.85 - 0.5 * place / len(kinds):.2f}"
            bars = axes.bar([x for x, _ in shown], [y for _, y in shown], 0.9 / (len(kinds) + 1), color=colour)
            axes.bar_label(bars, fmt="%.3f", fontsize=7, rotation=90, padding=2)
            bars.set_label(kind or "not refined")
        middle = (len(kinds) - 1) / (len(kinds) + 1) / 2
        axes.set_xticks([at + middle for at in range(len(bases))], bases)
        axes.set(title=dataset, ylabel="mask AP", ylim=(0, 1.25 * max(one["ap"] for one in named.values()) or 1))
        axes.legend(fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5))
    return figure_png(figure, dpi=110)


def _by_dataset(scores: Scores, table: Any) -> list[str]:
    lines: list[str] = []
    for dataset, named in scores.items():
        lines += [f"## {dataset}", "", *table(named), ""]
    return lines or [NOT_MEASURED, ""]


def _bases(named: dict[str, Any]) -> list[str]:
    return list(dict.fromkeys(name.partition("+")[0] for name in named))


def _edge_names(named: dict[str, Any], ours: str) -> list[str]:
    """Kinds of edges in the order of the file, ours last."""
    kinds = list(dict.fromkeys(name.partition("+")[2] for name in named if "+" in name))
    return sorted(kinds, key=lambda kind: kind == ours)


def _table_1(named: dict[str, dict[str, float]], ours: str) -> list[str]:
    rows = []
    for base in _bases(named):
        before, after = named.get(base), named.get(f"{base}+{ours}")
        rows.append([base, *_figures(before)])
        gain = after["ap"] - before["ap"] if before and after else None
        rows.append([f"{base} + {ours}", *_figures(after, gain)])
    return markdown_table(["masks", "AP", "AP50", "AP75", "AR100"], rows)


def _by_edges(named: dict[str, dict[str, float]], kinds: Sequence[str]) -> list[str]:
    """AP of each base (columns) with each kind of edges (rows); "": without refinement."""
    bases = _bases(named)
    rows = []
    for kind in kinds:
        cells = [named.get(f"{base}+{kind}" if kind else base) for base in bases]
        rows.append([kind or "none", *(_figure(cell["ap"] if cell else None) for cell in cells)])
    return markdown_table(["edges", *(f"{base} AP" for base in bases)], rows)


def _table_6(named: dict[str, dict[str, float]]) -> list[str]:
    rows = [[name, *(_figure(figures[key]) for key in _EDGES)] for name, figures in named.items()]
    return markdown_table(["edges", "ODS", "OIS", "clDice"], rows)


def _figures(scores: dict[str, float] | None, gain: float | None = None) -> list[str]:
    if scores is None:
        return [NOT_MEASURED, "", "", ""]
    ap, *others = (_figure(scores[key]) for key in _MASKS)
    return [ap if gain is None else f"{ap} ({gain:+.3f})", *others]


def _figure(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:.3f}"
