"""What an export did: parity, change, size, time; beside the engine as JSON, and on the screen."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from trace_sdk.atomic import write_text
from trace_sdk.export.quality import OdsChange
from trace_sdk.export.verify import Change
from trace_sdk.machine import hardware, versions

_LIBRARIES = ("torch", "onnx", "onnxscript", "onnxruntime", "numpy")


@dataclass(frozen=True)
class ExportReport:
    """Of one engine file.

    Attributes:
        engine, sha256, precision: as its manifest and its seal have them.
        parity: difference from PyTorch by "batch×height×width", at shapes that were not exported with; for a float
            engine the largest over pixels, for int8 the mean over cuts of photos.
        change: from the engine with float32 weights (for int8: fp16, what its float layers have); None for fp32.
        change_on: what pictures `change` was measured on.
        file_bytes, float_bytes: size of the file, and of the same engine with float32 weights.
        nodes: of the graph.
        milliseconds, float_milliseconds: median answer of three to one square of the default size, at most
            512 px, on this machine's CPU; a hint, `trace-sdk benchmark` measures. None where no CPU runs it (bf16).
        layers: numbers of layers and pictures, the layers kept in float, for int8 the calibration; None where all
            arithmetic is float32.
        ods: of the float engine and this one against known boundaries; None for fp32.
        seconds: the export took.
    """

    engine: str
    sha256: str
    precision: str
    parity: dict[str, float]
    change: Change | None
    change_on: str
    file_bytes: int
    float_bytes: int
    nodes: int
    milliseconds: float | None
    float_milliseconds: float
    layers: dict[str, Any] | None
    ods: OdsChange | None
    seconds: float

    def save(self, engine: Path) -> Path:
        """Write ENGINE.json beside the engine file. Raises OutputError."""
        file = engine.with_name(f"{engine.name}.json")
        record = {**asdict(self), "hardware": hardware(), "versions": versions(_LIBRARIES)}
        write_text(file, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        return file

    def to_table(self) -> Table:
        """For a rich console."""
        table = Table(title=f"{self.engine}, {self.precision}", show_header=False, title_justify="left")
        table.add_column(style="bold", no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in self._rows():
            table.add_row(name, value)
        return table

    def _rows(self) -> list[tuple[str, str]]:
        which = "mean" if self.layers else "largest"
        rows = [(f"{which} difference from PyTorch", ", ".join(f"{v:.1g} at {k}" for k, v in self.parity.items()))]
        if self.change:
            against = "fp16" if self.precision == "int8" else "fp32"
            rows.append(
                (
                    f"change from {against}",
                    f"{self.change.mean:.2g} on average, {self.change.largest:.2g} at most; "
                    f"{self.change.edges:.1%} of edge pixels shared ({self.change_on})",
                )
            )
        if self.ods:
            over = "" if self.ods.kept else f"; over the limit of {self.ods.limit:g}: look at --evaluate ANNOTATED"
            rows.append(("ODS", f"{self.ods.before:.4f} → {self.ods.after:.4f} ({self.ods.sample}){over}"))
        rows += self._layer_rows(self.layers) if self.layers else []
        size = f"{self.file_bytes / 1e6:.1f} MB (fp32 {self.float_bytes / 1e6:.1f} MB), {self.nodes} nodes"
        rows.append(("size", size))
        here = "not on a CPU" if self.milliseconds is None else f"{self.milliseconds:.0f} ms"
        rows.append(("answer here", f"{here} (fp32 {self.float_milliseconds:.0f} ms), CPU"))
        rows.append(("export took", f"{self.seconds:.0f} s"))
        return rows

    def _layer_rows(self, layers: dict[str, Any]) -> list[tuple[str, str]]:
        kept, too_large = layers["kept_in_float"], layers.get("too_large", {})
        rows = []
        if "calibration" in layers:
            rows.append(("calibration", f"{layers['calibration']} on {layers['calibrated_on']} photos"))
        bits = "8-bit layers" if self.precision == "int8" else "16-bit products"
        rows.append((bits, f"{layers['layers'] - len(kept) - len(too_large)} of {layers['layers']}"))
        rows += [("kept in float", f"{name} (gives {value:.2g})") for name, value in too_large.items()]
        return rows + [("kept in float", f"{name} (alone {harm:.2g})") for name, harm in kept.items()]
