"""What killed writers leave beside a file is told from what belongs to others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from trace_sdk.atomic import remove_unfinished, whole_file


def left_by_a_kill(target: Path) -> Path:
    with whole_file(target) as unfinished:
        pass
    target.rename(unfinished)
    return unfinished


@pytest.mark.parametrize("name", ["a[1].npz", "street.jpg.npz", "é" * 127], ids=["pattern", "dots", "long"])
def test_only_of_these_files(name: str, tmp_path: Path) -> None:
    """Names that were shortened for their temporary files were not found again."""
    target = tmp_path / "deep" / name
    left, others = left_by_a_kill(target), left_by_a_kill(target.with_name("other"))
    remove_unfinished([target, tmp_path / "missing/file"])
    assert not left.exists() and others.exists()


def test_what_may_still_be_written_stays(tmp_path: Path) -> None:
    left = left_by_a_kill(tmp_path / "a")
    remove_unfinished([tmp_path / "a"], untouched=60)
    assert left.exists()
    os.utime(left, (0, 0))
    remove_unfinished([tmp_path / "a"], untouched=60)
    assert not left.exists()
