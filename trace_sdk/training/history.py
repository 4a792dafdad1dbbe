"""The curves of a run: one CSV, a row a step, cut back with the state when a run goes on; and their picture."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from trace_sdk.atomic import write_text
from trace_sdk.figures import new_figure, save_figure

CURVES, PICTURE = "curves.csv", "curves.png"


class History:
    """Rows of numbers by step. `save` writes them; what an earlier run wrote up to its last state is kept."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._rows: dict[int, dict[str, str]] = {}

    def restore(self, step: int) -> None:
        """Read the rows up to `step`; later ones are of steps that will be done again."""
        file = self._folder / CURVES
        if file.is_file():
            rows = csv.DictReader(io.StringIO(file.read_text("utf-8")))
            self._rows = {int(row["step"]): row for row in rows if int(row["step"]) <= step}

    def add(self, step: int, values: dict[str, float]) -> None:
        """Keep values of a step; more may be added to the same step."""
        row = self._rows.setdefault(step, {"step": str(step)})
        row |= {name: f"{value:.6g}" for name, value in values.items()}

    def save(self) -> None:
        """Write the CSV, whole."""
        columns = list(dict.fromkeys(name for row in self._rows.values() for name in row))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(self._rows.values())
        write_text(self._folder / CURVES, text.getvalue())

    def plot(self) -> None:
        """Draw every column over the steps, one below the other; nothing where there are no rows."""
        if not self._rows:
            return
        columns = list(dict.fromkeys(name for row in self._rows.values() for name in row if name != "step"))
        figure = new_figure(8, 2 * len(columns))
        for axes, name in zip(figure.subplots(len(columns), sharex=True, squeeze=False)[:, 0], columns, strict=True):
            points = [(step, float(row[name])) for step, row in sorted(self._rows.items()) if row.get(name)]
            axes.plot(*zip(*points, strict=True), marker="." if len(points) < 50 else "", color="black", linewidth=1)
            axes.set_ylabel(name)
        axes.set_xlabel("step")
        save_figure(figure, self._folder / PICTURE, dpi=90)
