"""The paper's tables from results: figures land in their rows, gaps are said, contradictions refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from trace_sdk.cli import main


def masks(ap: float) -> dict[str, float]:
    return {"ap": ap, "ap50": ap + 0.1, "ap75": ap - 0.1, "ar100": ap + 0.2}


def put(folder: Path, methods: Any = None, found: Any = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "methods": {name: {"val": {"ods": ods, "ois": ods, "cldice": ods}} for name, ods in (methods or {}).items()},
        "masks": {name: {"val": masks(ap)} for name, ap in (found or {}).items()},
    }
    (folder / "quality.json").write_text(json.dumps(content))


@pytest.fixture
def results(tmp_path: Path) -> Path:
    put(tmp_path / "r/edges", {"canny": 0.3, "trace": 0.5})
    put(tmp_path / "r/masks", found={"cutler": 0.2, "cutler+trace": 0.25, "cutler+canny": 0.15, "mask": 0.3})
    return tmp_path / "r"


def rows(text: str, title: str) -> dict[str, list[str]]:
    section = text.partition(title)[2].partition("\n# ")[0]
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in section.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in cells[2:]}


def test_every_table(results: Path, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["tables", str(results), "-o", str(tmp_path / "t.md"), "--ablation", "canny,x,trace"]
    )
    assert result.exit_code == 0, result.output
    text = (tmp_path / "t.md").read_text()
    assert text in result.stdout
    first = rows(text, "Table 1")
    assert first["cutler"] == ["0.200", "0.300", "0.100", "0.400"]
    assert first["cutler + trace"] == ["0.250 (+0.050)", "0.350", "0.150", "0.450"]
    assert first["mask + trace"][0] == "not measured"
    assert rows(text, "Table 3") == {
        "none": ["0.200", "0.300"],
        "canny": ["0.150", "not measured"],
        "x": ["not measured", "not measured"],
        "trace": ["0.250", "not measured"],
    }
    assert rows(text, "Table 6") == {"canny": ["0.300"] * 3, "trace": ["0.500"] * 3}
    assert list(rows(text, "Figure 10")) == ["none", "canny", "trace"]


def test_what_is_missing_is_said(tmp_path: Path) -> None:
    put(tmp_path / "r", {"canny": 0.3})
    text = CliRunner().invoke(main, ["tables", str(tmp_path / "r")]).stdout
    assert text.count("not measured") == 3 and rows(text, "Table 6") == {"canny": ["0.300"] * 3}


@pytest.mark.parametrize(
    ("harm", "said"),
    [
        (lambda f: (f / "edges/quality.json").write_text("{"), "is not a result of trace-sdk evaluate"),
        (lambda f: (f / "edges/quality.json").write_text('{"methods": {"a": {"val": {}}}}'), "KeyError"),
        (lambda f: put(f / "again", {"canny": 0.4}), "differ about canny on val"),
        (lambda f: [file.unlink() for file in f.rglob("quality.json")], "No quality.json in"),
    ],
)
def test_bad_results(results: Path, harm: Any, said: str) -> None:
    harm(results)
    result = CliRunner().invoke(main, ["tables", str(results)])
    assert result.exit_code == 1 and said in result.stderr and "Traceback" not in result.output


def test_figure_10_has_a_bar_for_each_figure(results: Path, tmp_path: Path) -> None:
    import PIL.Image

    out = tmp_path / "t.md"
    result = CliRunner().invoke(main, ["tables", str(results), "-o", str(out), "--plot"])
    assert result.exit_code == 0, result.output
    with PIL.Image.open(tmp_path / "t.figure10.png") as picture:
        pixels = picture.convert("RGB").getcolors(1 << 24)
        tall = picture.height
    assert pixels is not None
    # Ours is black: a bar for cutler+trace, 0.25 of an axis that goes to 1.25 times the highest, 0.3.
    black = next(count for count, colour in pixels if colour == (0, 0, 0))
    put(tmp_path / "none", found={"cutler": 0.2, "cutler+trace": 0.0, "cutler+canny": 0.15, "mask": 0.3})
    CliRunner().invoke(main, ["tables", str(tmp_path / "none"), "-o", str(tmp_path / "n.md"), "--plot"])
    with PIL.Image.open(tmp_path / "n.figure10.png") as picture:
        less = next(count for count, colour in picture.convert("RGB").getcolors(1 << 24) if colour == (0, 0, 0))
    assert black - less > tall * 2


def test_figure_10_needs_masks_and_a_file(results: Path, tmp_path: Path) -> None:
    put(tmp_path / "edges", {"canny": 0.3})
    result = CliRunner().invoke(main, ["tables", str(tmp_path / "edges"), "-o", str(tmp_path / "e.md"), "--plot"])
    assert result.exit_code == 0 and "Figure 10 is not drawn" in result.stderr
    assert not (tmp_path / "e.figure10.png").exists()
    result = CliRunner().invoke(main, ["tables", str(results), "--plot"])
    assert result.exit_code == 2 and "Name it with -o" in result.stderr
