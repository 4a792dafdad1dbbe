"""Latency, throughput and memory as tables on the screen, JSON, Markdown and a plot, with what made them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.table import Column, Table

from trace_sdk.atomic import write_bytes, write_text
from trace_sdk.figures import figure_png, new_figure
from trace_sdk.machine import gpus, versions
from trace_sdk.reports import made_by, markdown_list, markdown_table

SECONDS = 20  # after which a round of single answers ends, once it has five
REPEATABLE = 0.05  # by how much the rounds' medians may differ
STAGES = ("decode", "resize", "network", "resize_back")
_LIBRARIES = (
    "numpy",
    "pillow",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt_rtx_cu13_libs",
    "torch",
    "scikit-image",
    "opencv-python",
    "opencv-python-headless",
)


@dataclass(frozen=True)
class Row:
    """One method.

    Attributes:
        name: engine and device, or baseline.
        info: an engine's `EdgeMap.info`; None for a baseline.
        cold: seconds of each cold start: imports, open, first_answer, total.
        rounds: what the worker measured in each round.
        change: mean difference of the edge probability from the first engine's.
    """

    name: str
    info: dict[str, Any] | None
    cold: list[dict[str, float]]
    rounds: list[dict[str, Any]]
    change: float | None

    def quantile(self, q: float) -> float:
        """Of the latency over all rounds, ms."""
        return float(np.quantile([ms for one in self.rounds for ms in one["milliseconds"]], q))

    @property
    def differ(self) -> float:
        """Largest difference between the rounds' medians, as a part of their median."""
        medians = [float(median(one["milliseconds"])) for one in self.rounds]
        return (max(medians) - min(medians)) / median(medians)

    def stage(self, name: str) -> float | None:
        """Median ms of a stage; None if the method has no such stage."""
        values = [ms for one in self.rounds for ms in one["stages"].get(name, [])]
        return median(values) if values else None

    def throughput(self, batch: int) -> float | None:
        """Images per second with `EdgeDetector.stream(batch=…)`, median of the rounds."""
        values = [one["images_per_second"][str(batch)] for one in self.rounds if str(batch) in one["images_per_second"]]
        return median(values) if values else None

    @property
    def batches(self) -> list[int]:
        """Batch sizes that were measured; none for a baseline."""
        return [int(batch) for batch in self.rounds[0]["images_per_second"]]

    def memory(self, batch: int | None = None) -> float:
        """Peak resident memory of the process up to that batch, MiB; None: single answers only."""
        return max(int(one["peak_memory"][str(batch or "single")]) for one in self.rounds) / 2**20

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "info": self.rounds[0]["info"],
            "p50_ms": self.quantile(0.5),
            "p90_ms": self.quantile(0.9),
            "p99_ms": self.quantile(0.99),
            "answers": sum(len(one["milliseconds"]) for one in self.rounds),
            "cold_start_s": median(one["total"] for one in self.cold),
            "stages_p50_ms": {name: value for name in STAGES if (value := self.stage(name)) is not None},
            "images_per_second": {batch: self.throughput(batch) for batch in self.batches},
            "peak_memory_mib": {"single": self.memory(), **{str(batch): self.memory(batch) for batch in self.batches}},
            "rounds_differ": self.differ,
            "mean_change_from_first_engine": self.change,
            "cold_starts": self.cold,
            "rounds": self.rounds,
        }


@dataclass
class Report:
    """Rows as they come; `missing` has each method that was not measured, with its reason."""

    runs: int
    rounds: int
    photos: int
    rows: list[Row] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.provenance = {
            **made_by(),
            "gpus": "; ".join(gpus()) or "none",
            "versions": versions(_LIBRARIES),
            "load_before": _load(),
        }

    def finish(self) -> None:
        """Note how busy the machine was at the end."""
        self.provenance["load_after"] = _load()

    @property
    def noisiest(self) -> Row:
        """The row whose rounds differ most."""
        return max(self.rows, key=lambda row: row.differ)

    def verdict(self) -> str:
        """Whether the measurement repeats, in one sentence."""
        if not self.rows:
            return "Nothing was measured."
        if self.rounds == 1:
            return "One round only: not known whether it repeats."
        worst = self.noisiest
        if worst.differ <= REPEATABLE:
            return f"Repeats: the medians of {self.rounds} rounds lie within {worst.differ:.1%} for every method."
        return (
            f"Noisy machine: the medians of {self.rounds} rounds differ by up to {worst.differ:.0%} ({worst.name}); "
            f"{REPEATABLE:.0%} would be repeatable. Differences between methods below that mean nothing here: measure "
            "again on a quiet machine."
        )

    def to_dict(self) -> dict[str, Any]:
        """Everything, every single time included, ready for JSON."""
        return {
            "provenance": self.provenance,
            "runs": self.runs,
            "rounds": self.rounds,
            "photos": self.photos,
            "repeats_within_5_percent": self.verdict().startswith("Repeats"),
            "verdict": self.verdict(),
            "methods": {row.name: row.to_dict() for row in self.rows},
            "not_measured": self.missing,
        }

    def to_tables(self) -> list[Table]:
        """For a rich console: latency, stages, throughput."""
        tables = []
        for title, header, rows in self._tables():
            columns = [Column(header[0], overflow="fold"), *(Column(name, justify="right") for name in header[1:])]
            table = Table(*columns, title=title, title_justify="left")
            for row in rows:
                table.add_row(*row)
            tables.append(table)
        return tables

    def to_markdown(self) -> str:
        """The same tables, the verdict, and the provenance."""
        lines = ["# Latency", ""]
        for title, header, rows in self._tables():
            lines += [title, "", *markdown_table(header, rows), ""]
        lines += [self.verdict(), "", self.footnote(), ""]
        lines += [f"* {name}: not measured ({reason})" for name, reason in self.missing.items()]
        return "\n".join([*lines, *markdown_list(self.provenance), ""])

    def footnote(self) -> str:
        """What the figures are of."""
        photos = "1 photo" if self.photos == 1 else f"{self.photos} photos"
        return (
            f"Encoded bytes in, edges at the photo's size out, {photos}; {self.rounds} rounds of up to {self.runs} "
            f"answers or {SECONDS} s. Cold start: from starting Python to the first answer, in a new process. Memory: "
            "of the whole process. Change: mean difference of the probability from the first engine's."
        )

    def save(self, folder: str | os.PathLike[str], *, plot: bool = False) -> list[Path]:
        """Write latency.json, latency.md and, with `plot`, latency.png. Raises OutputError, MissingExtraError."""
        folder = Path(folder)
        files = [folder / "latency.json", folder / "latency.md"]
        write_text(files[0], json.dumps(self.to_dict(), indent=1, ensure_ascii=False) + "\n")
        write_text(files[1], self.to_markdown())
        if plot:
            files.append(folder / "latency.png")
            write_bytes(files[2], self.plot())
        return files

    def plot(self) -> bytes:
        """PNG: the median split into stages with a whisker to p99, and throughput by batch."""
        figure = new_figure(9, 1.6 + 0.5 * len(self.rows))
        latency, throughput = figure.subplots(1, 2, width_ratios=[3, 2])
        places = np.arange(len(self.rows))
        left = np.zeros(len(self.rows))
        for stage in STAGES:
            widths = np.array([row.stage(stage) or 0.0 for row in self.rows])
            latency.barh(places, widths, left=left, label=stage.replace("_", " "))
            left += widths
        for place, row in zip(places, self.rows, strict=True):
            latency.plot(
                [row.quantile(0.5), row.quantile(0.99)], [place, place], color="black", marker="|", linewidth=1
            )
            if row.batches:
                speeds = [row.throughput(batch) or 0.0 for batch in row.batches]
                throughput.plot(row.batches, speeds, "o-", label=row.name)
        latency.set_yticks(places, [row.name for row in self.rows])
        latency.invert_yaxis()
        latency.set_xlabel("ms a photo: stages at the median, whisker from p50 to p99")
        latency.legend(fontsize="small")
        throughput.set(xlabel="batch", ylabel="photos per second", ylim=(0, None))
        throughput.xaxis.get_major_locator().set_params(integer=True)
        throughput.legend(fontsize="x-small")
        return figure_png(figure, dpi=110)

    def _tables(self) -> list[tuple[str, list[str], list[list[str]]]]:
        """Title, header and rows of each; narrow enough for a terminal of 80 columns."""
        batches = sorted({batch for row in self.rows for batch in row.batches})
        latency, stages, throughput = [], [], []
        for row in self.rows:
            cold = f"{median(one['total'] for one in row.cold):.2f} s"
            quantiles = [_ms(row.quantile(q)) for q in (0.5, 0.9, 0.99)]
            latency.append([row.name, *quantiles, cold, f"{row.differ:.1%}"])
            change = "-" if row.change is None else f"{row.change:.1g}"
            stages.append([row.name, *(_ms(row.stage(stage)) for stage in STAGES), change])
            memory = [f"{row.memory():.0f}", f"{row.memory(row.batches[-1]):.0f}" if row.batches else "-"]
            throughput.append([row.name, *(_figure(row.throughput(batch)) for batch in batches), *memory])
        return [
            ("One photo, ms", ["method", "p50", "p90", "p99", "cold start", "rounds differ"], latency),
            (
                "Its stages at the median, ms",
                ["method", *(stage.replace("_", " ") for stage in STAGES), "change"],
                stages,
            ),
            (
                "Photos per second by batch, and peak MiB",
                ["method", *(f"×{batch}" for batch in batches), "MiB ×1", f"MiB ×{max(batches, default=1)}"],
                throughput,
            ),
        ]


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}"


def _load() -> float | None:
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
