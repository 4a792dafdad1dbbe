"""One table of all methods on all data sets, as JSON, as Markdown and on the screen, with what made it."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Column, Table

from trace_sdk.atomic import write_text
from trace_sdk.evaluation.datasets import Dataset
from trace_sdk.evaluation.edges import MAX_DIST, THRESHOLDS, EdgeScores
from trace_sdk.evaluation.instances import MaskScores
from trace_sdk.evaluation.panoptic import PanopticScores
from trace_sdk.machine import versions
from trace_sdk.reports import made_by, markdown_list, markdown_table

COLUMNS = ("ODS", "OIS", "AP", "clDice", "touch F", "touch R", "images", "s/image")
REFERENCE = "canny"  # "touch R" is taken at the precision that this method has at its ODS
_LIBRARIES = ("numpy", "scipy", "scikit-image", "pillow", "pycocotools", "onnxruntime", "torch")


@dataclass
class Report:
    """Scores by method and data set, filled in as they come.

    rows: method → data set → scores. missing: method → why it was not measured. agreement: data set →
    F-measure of each annotator against the others. masks, panoptic: name → data set → scores of a file.
    """

    thresholds: int = THRESHOLDS
    max_dist: float = MAX_DIST
    datasets: dict[str, dict[str, Any]] = field(default_factory=dict)
    rows: dict[str, dict[str, EdgeScores]] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    agreement: dict[str, float] = field(default_factory=dict)
    masks: dict[str, dict[str, MaskScores]] = field(default_factory=dict)
    panoptic: dict[str, dict[str, PanopticScores]] = field(default_factory=dict)

    def add_dataset(self, dataset: Dataset) -> None:
        """Give the table a group of columns for `dataset`."""
        about = {"path": str(dataset.path), "kind": dataset.kind, "images": len(dataset)}
        self.datasets[dataset.name] = about

    def add(self, dataset: Dataset, method: str, scores: EdgeScores) -> None:
        """Fill one cell."""
        self.rows.setdefault(method, {})[dataset.name] = scores

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "provenance": self._provenance(),
            "datasets": self.datasets,
            "annotators": self.agreement,
            "methods": {
                name: {
                    dataset: {**scores.to_dict(), "touching_recall": self.touching_recall(dataset, scores)}
                    for dataset, scores in row.items()
                }
                for name, row in self.rows.items()
            },
            "not_measured": self.missing,
            "masks": {name: {key: one.to_dict() for key, one in row.items()} for name, row in self.masks.items()},
            "panoptic": {name: {key: one.to_dict() for key, one in row.items()} for name, row in self.panoptic.items()},
        }

    def touching_recall(self, dataset: str, scores: EdgeScores) -> float | None:
        """Recall of contacts between touching instances of one class where all edges are as precise as Canny's.

        None where the set has no contact, or Canny was not measured on it.
        """
        reference = self.rows.get(REFERENCE, {}).get(dataset)
        if scores.contacts is None or reference is None:
            return None
        return scores.contacts.recall_at(reference.precision)

    def to_markdown(self) -> str:
        """Markdown tables, then the provenance."""
        header = ["method", *(f"{name} {column}" for name in self.datasets for column in COLUMNS)]
        groups = [self._cells(name) for name in self.datasets]
        rows = [[row[0][0], *(cell for _, cells in row for cell in cells)] for row in zip(*groups, strict=True)]
        table = markdown_table(header, rows)
        edges = ["# Edge quality", "", *table, ""] if self.rows else []
        for title, columns, cells in self._others():
            edges += [f"# {title}", "", *markdown_table(["method", *columns], cells), ""]
        return "\n".join([*edges, *markdown_list(self._provenance()), ""])

    def to_tables(self) -> list[Table]:
        """The same for a rich console, one table a data set so that it fits 80 columns."""
        tables = []
        for name in self.datasets if self.rows else ():
            columns = [Column(column, justify="right", no_wrap=True) for column in COLUMNS]
            missing = "\n".join(f"{method}: {reason}" for method, reason in self.missing.items())
            table = Table("method", *columns, title=name, caption=missing, box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
            for method, cells in self._cells(name):
                if method not in self.missing:
                    table.add_row(method, *cells)
            tables.append(table)
        for title, names, rows in self._others():
            table = Table("method", *(Column(n, justify="right") for n in names), title=title, box=SIMPLE_HEAD)
            for row in rows:
                table.add_row(*row)
            tables.append(table)
        return tables

    def _others(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Title, columns and rows of the tables of masks and of panoptic segments, where there are any."""
        mask_rows = [
            [name, dataset, *map(_figure, (one.ap, one.ap50, one.ap75, one.ar100)), str(one.masks)]
            for name, row in self.masks.items()
            for dataset, one in row.items()
        ]
        segment_rows = [
            [name, f"{dataset}, {kind}", *map(_figure, (one.pq, one.sq, one.rq)), str(one.categories)]
            for name, row in self.panoptic.items()
            for dataset, scores in row.items()
            for kind, one in (("all", scores.all), ("things", scores.things), ("stuff", scores.stuff))
            if one is not None
        ]
        tables = [
            ("Masks, class-agnostic", ["data set", "AP", "AP50", "AP75", "AR100", "masks"], mask_rows),
            ("Panoptic quality", ["data set", "PQ", "SQ", "RQ", "categories"], segment_rows),
        ]
        return [table for table in tables if table[2]]

    def _provenance(self) -> dict[str, Any]:
        protocol = {"thresholds": self.thresholds, "max_dist": self.max_dist}
        return {**made_by(), "libraries": versions(_LIBRARIES), **protocol}

    def save(self, folder: str | Path) -> tuple[Path, Path]:
        """Write quality.json and quality.md into `folder`. Raises OutputError."""
        json_file, markdown = Path(folder) / "quality.json", Path(folder) / "quality.md"
        write_text(json_file, json.dumps(self.to_dict(), indent=2, ensure_ascii=False) + "\n")
        write_text(markdown, self.to_markdown())
        return json_file, markdown

    def _cells(self, dataset: str) -> list[tuple[str, list[str]]]:
        """Method and cells of each row, the same rows for every data set."""
        rest = [""] * (len(COLUMNS) - 1)
        human = [("annotators", [_figure(self.agreement.get(dataset)), *rest])] if self.agreement else []
        measured = [(method, self._row(dataset, row.get(dataset))) for method, row in self.rows.items()]
        return [*human, *measured, *((method, [reason, *rest]) for method, reason in self.missing.items())]

    def _row(self, dataset: str, scores: EdgeScores | None) -> list[str]:
        if scores is None:
            return ["-"] * len(COLUMNS)
        contacts = None if scores.contacts is None else scores.contacts.f
        quality = (scores.ods, scores.ois, scores.ap, scores.cldice, contacts, self.touching_recall(dataset, scores))
        return [*map(_figure, quality), str(scores.images), _figure(scores.seconds)]


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"
