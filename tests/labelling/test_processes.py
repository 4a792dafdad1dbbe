"""Several processes on one folder: shared work, kill -9, claims, and Ray."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.cli import main
from trace_sdk.errors import OutputError
from trace_sdk.labelling.claims import Claims
from trace_sdk.labelling.images import find_images
from trace_sdk.labelling.label import LabelJob
from trace_sdk.labelling.states import forget_failures
from trace_sdk.teacher.labels import CLAIMS
from trace_sdk.teacher.teacher import Teacher, TeacherSettings

SMALL = TeacherSettings(size=96, stride=300)


WORKERS = """
import os, sys
from pathlib import Path
from trace_sdk.backbones.pixel import PixelBackbone
from trace_sdk.labelling.images import find_images
from trace_sdk.labelling.label import LabelJob
from trace_sdk.teacher.teacher import Teacher, TeacherSettings

os.fork()
backbone, images, labels = sys.argv[1:]
teacher = Teacher(PixelBackbone.load(backbone), TeacherSettings(size=96, stride=300))
summary = LabelJob(teacher, find_images(images), Path(labels), "sha", batch=2).run()
print(summary.done, summary.before + summary.elsewhere, len(summary.failed), flush=True)
"""


def test_two_processes_share_the_work(
    tiny_backbone: PixelBackbone, many: Path, tmp_path: Path, contents: Any, job: Any
) -> None:
    """One process that becomes two before either has done anything, so that imports are paid once."""
    tiny_backbone.save(tmp_path / "backbone")
    run = [sys.executable, "-c", WORKERS, str(tmp_path / "backbone"), str(many), str(tmp_path / "out")]
    said = subprocess.run(run, stdout=subprocess.PIPE, check=True, timeout=120, text=True).stdout
    counts = [tuple(map(int, line.split())) for line in said.splitlines()]
    assert len(counts) == 2 and sum(done for done, _, _ in counts) == 21, "labelled twice, or by nobody"
    assert all(done and done + others in (21, 22) and failed == 1 for done, others, failed in counts)
    alone = job(PixelBackbone.load(tmp_path / "backbone"), many, tmp_path / "alone")
    alone.run()
    assert contents(tmp_path / "out") == contents(tmp_path / "alone")


LABEL = ["label", "--size", "96", "--stride", "300", "--batch", "2"]


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-c", "from trace_sdk.cli import main; main()", *map(str, arguments)]


def test_kill_9_loses_a_batch_and_no_byte(
    tiny_backbone: PixelBackbone, many: Path, tmp_path: Path, contents: Any
) -> None:
    """Two real processes on one folder, one killed: what it held is taken over, what it wrote stays as it was."""
    tiny_backbone.save(tmp_path / "backbone")
    arguments = [*LABEL, many, "--backbone", tmp_path / "backbone"]
    out, expected = tmp_path / "out", tmp_path / "expected"
    slow = {**os.environ, "OMP_NUM_THREADS": "1"}
    victim = subprocess.Popen(command(*arguments, "-o", out), env=slow, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while len(list(out.rglob("*.npz"))) < 3:
        assert time.monotonic() < deadline and victim.poll() is None
        time.sleep(0.002)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    kept = {file: file.stat().st_mtime_ns for file in out.rglob("*.npz")}
    assert 3 <= len(kept) < 21 and not (out / "manifest.jsonl").exists()
    assert list((out / CLAIMS).glob("*.claim")), "killed between two shards; it should hold one"
    (out / ".p14.png.npz.k3j9x2aa.tmp").write_bytes(b"half")  # as a kill in the middle of a write leaves it

    survivor = CliRunner().invoke(main, [str(a) for a in (*arguments, "-o", out)])
    assert survivor.exit_code == 1, survivor.output  # p03b.png is no picture
    assert f"{21 - len(kept)} labelled" in survivor.output and "1 failed" in survivor.output
    assert re.search(r"label: 22/22 [\d.]+ images/s", survivor.output)
    assert all(file.stat().st_mtime_ns == time_ns for file, time_ns in kept.items())
    assert CliRunner().invoke(main, [str(a) for a in (*arguments, "-o", expected)]).exit_code == 1
    assert contents(out) == contents(expected)


def test_claims_exclude_each_other_and_outlive_nobody(tmp_path: Path) -> None:
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    with Claims(tmp_path) as mine, Claims(tmp_path) as other:
        other._mark = json.dumps({"host": "another machine", "pid": 1})
        assert mine.take("a") and not mine.take("a") and not other.take("a")
        mine.release("a")
        assert other.take("a") and not mine.take("a")
        (tmp_path / "b.claim").write_text(json.dumps({"host": os.uname().nodename, "pid": gone.pid}))
        assert mine.take("b")
        (tmp_path / "c.claim").write_text("")
        assert not mine.take("c"), "it may be in the middle of its first write"
        (tmp_path / "d.claim").write_text(json.dumps({"host": "another machine", "pid": 1}))
        assert not mine.take("d")
        os.utime(tmp_path / "d.claim", (time.time() - 1000,) * 2)
        assert mine.take("d") and not other.take("d")
    assert [file.name for file in tmp_path.iterdir()] == ["c.claim"]


def test_a_full_disk_leaves_no_claim(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty one counted as held, and the next run waited two minutes for it."""

    class Full(io.StringIO):
        def write(self, _: str) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def full(file: Path, mode: str = "r", **_: str) -> io.StringIO:
        assert mode == "x"
        file.touch(exist_ok=False)
        return Full()

    with Claims(tmp_path) as claims:
        monkeypatch.setattr(Path, "open", full)
        with pytest.raises(OutputError, match=r"a\.claim: No space left"):
            claims.take("a")
        monkeypatch.undo()
        assert claims.take("a")


def test_failures_that_cannot_be_forgotten(tmp_path: Path) -> None:
    """On a read-only folder --retry-failed ended with a traceback. Root may write anywhere: a folder in the way."""
    (tmp_path / "a.jpg.failed").mkdir()
    with pytest.raises(OutputError, match=r"Cannot write \S+a\.jpg\.failed"):
        forget_failures(tmp_path, ["a.jpg"])


def test_a_claim_is_touched_while_its_holder_lives(tmp_path: Path) -> None:
    with Claims(tmp_path, stale_seconds=0.4) as mine, Claims(tmp_path, stale_seconds=0.4) as other:
        other._mark = json.dumps({"host": "another machine", "pid": 1})
        assert mine.take("a")
        time.sleep(1)
        assert not other.take("a")


def test_ray_fills_the_same_folder(tiny_backbone: PixelBackbone, many: Path, tmp_path: Path, contents: Any) -> None:
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'trace-sdk[ray]'")
    from trace_sdk.labelling.ray import RayLabeller, image_rows

    tiny_backbone.save(tmp_path / "backbone")
    few = [many / f"p0{number}.png" for number in range(3)] + [many / "p03b.png", many / "t.tar"]
    weights = {"backbone": str(tmp_path / "backbone"), "settings": SMALL}
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    try:
        rows = ray.data.from_items(image_rows(few)).map_batches(
            RayLabeller, fn_constructor_kwargs=weights | {"labels": str(tmp_path / "ray")}, batch_size=1, concurrency=1
        )
        said = {row["name"]: (row["state"], row["reason"]) for row in rows.take_all()}
    finally:
        ray.shutdown()
    teacher = Teacher(PixelBackbone.load(tmp_path / "backbone"), SMALL)
    here = LabelJob(teacher, find_images(few), tmp_path / "here", PixelBackbone.sha256(tmp_path / "backbone"))
    failed = here.run().failed
    assert said == {name: ("failed", failed[name]) if name in failed else ("done", "") for name in here._names}
    made = contents(tmp_path / "ray")
    assert len(made) == 9 + 1 + 1 and made == {k: v for k, v in contents(tmp_path / "here").items() if k in made}
    assert set(contents(tmp_path / "here")) - set(made) == {"manifest.jsonl"}
