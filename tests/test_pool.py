"""Jobs in worker processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from trace_sdk.errors import OutOfMemoryError
from trace_sdk.pool import THREADS, job_pool


@pytest.mark.parametrize(("asked", "expected"), [(None, "1"), ("3", "3")])
def test_workers_compute_with_one_thread_unless_told_otherwise(
    asked: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in THREADS:
        monkeypatch.delenv(name, raising=False)
        if asked:
            monkeypatch.setenv(name, asked)
    with job_pool(os.getenv, 2) as submit:
        assert [submit(name).result() for name in THREADS] == [expected] * len(THREADS)
    assert [os.getenv(name) for name in THREADS] == [asked] * len(THREADS)


def test_one_worker_is_this_process() -> None:
    with job_pool(os.getpid, 1) as submit:
        assert submit().result() == os.getpid()


def test_a_worker_that_was_killed_is_said() -> None:
    with pytest.raises(OutOfMemoryError, match="fewer --workers"), job_pool(signal.raise_signal, 2) as submit:
        submit(signal.SIGKILL).result()


def test_ctrl_c_is_left_to_the_parent() -> None:
    """Workers that were waiting, or still loading, printed a traceback each."""
    with job_pool(signal.getsignal, 2) as submit:
        assert submit(signal.SIGINT).result() == signal.SIG_IGN


KILLED = """
import os, signal
from trace_sdk.pool import job_pool
if __name__ == "__main__":
    with job_pool(os.getpid, 2) as submit:
        print(submit().result(), flush=True)
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_of_a_process_that_was_killed_end_with_it(tmp_path: Path) -> None:
    """They stayed for ever, each with its memory."""
    (tmp_path / "killed.py").write_text(KILLED)
    # Output ends when the last worker has ended, who has it, too.
    ended = subprocess.run([sys.executable, tmp_path / "killed.py"], stdout=subprocess.PIPE, text=True, timeout=60)
    assert ended.returncode == -signal.SIGKILL and ended.stdout
