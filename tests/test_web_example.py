"""examples/web in a real headless browser: the numbers are Python's, and nothing leaves the page."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import pytest

from trace_sdk import EdgeDetector
from trace_sdk.export.any_size import take_any_size

ROOT = Path(__file__).parents[1]
EXAMPLE = ROOT / "examples/web"
# Elsewhere than beside the example: TRACE_NODE_MODULES=/path/to/node_modules.
MODULES = Path(os.environ.get("TRACE_NODE_MODULES", EXAMPLE / "node_modules"))
PACKAGES = ("onnxruntime-web", "playwright-core")

pytestmark = [
    pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed"),
    pytest.mark.skipif(
        not all((MODULES / package).is_dir() for package in PACKAGES), reason="needs npm install in examples/web"
    ),
]


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def site(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """A copy of the example without an engine, served on this machine."""
    folder = tmp_path / "site"
    folder.mkdir()
    for file in EXAMPLE.glob("*.*"):
        if file.is_file():
            (folder / file.name).write_bytes(file.read_bytes())
    (folder / "node_modules").symlink_to(MODULES.absolute())
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=folder)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def drop(site: tuple[Path, str], photo: Path, chromium: str, out: Path) -> dict[str, Any]:
    command = ["node", f"{ROOT}/tests/drop_on_page.mjs", site[1], f"{photo}", chromium, f"{out}"]
    subprocess.run(command, cwd=MODULES.parent, check=True, timeout=240)
    answer: dict[str, Any] = json.loads(out.read_text())
    return answer


def test_the_browser_answers_like_python(
    site: tuple[Path, str], chromium: str, make_engine: Callable[..., bytes], tmp_path: Path
) -> None:
    tiny = tmp_path / "tiny.onnx"
    tiny.write_bytes(make_engine(threshold=0.355269))  # between two hundredths, as trace-small's
    engine = os.environ.get("TRACE_WEB_ENGINE", f"{tiny}")
    (site[0] / "engine.onnx").write_bytes(take_any_size(Path(engine).read_bytes(), "engine"))
    cells = np.random.default_rng(0).integers(0, 256, (22, 38, 3), np.uint8)
    photo = np.kron(cells, np.ones((8, 8, 1), np.uint8))[:175, :301]
    PIL.Image.fromarray(photo).save(tmp_path / "photo.png")
    seen = drop(site, tmp_path / "photo.png", chromium, tmp_path / "seen.json")
    expected = EdgeDetector(engine, device="cpu").run(photo)
    found = np.array(seen["edges"], np.float32).reshape(175, 301)
    assert np.abs(found - expected.probability).max() <= 1e-3 and found.max() > 0.3
    assert float(seen["threshold"]) == expected.info["threshold"]
    for threshold, red in seen["red"].items():
        assert red == np.count_nonzero(found >= float(threshold)), f"drawn at {threshold}"
    assert {length for _, length in seen["shown"]} == {175 * 301}, "the answer to another photo was shown"
    assert seen["status"].startswith("301×175, ") and not seen["errors"]
    assert seen["sent"] == [], "something was requested after the photo was dropped"
    assert all(request.startswith(f"GET {site[1]}") for request in seen["requests"])


@pytest.mark.parametrize(
    ("file", "message"), [(None, "engine.onnx is missing"), ("padded", "does not scale by itself")]
)
def test_a_wrong_engine_is_said(
    file: str | None, message: str, site: tuple[Path, str], chromium: str, tiny_engine: Path, tmp_path: Path
) -> None:
    if file:
        (site[0] / "engine.onnx").write_bytes(tiny_engine.read_bytes())
    assert message in drop(site, tmp_path, chromium, tmp_path / "seen.json")["loaded"]
