from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from trace_sdk.cli import main
from trace_sdk.errors import OutputError
from trace_sdk.machine import cache_folder, commit, hardware, peak_memory, usable_cpus, versions

V1 = {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}


@pytest.mark.parametrize(
    ("group", "files", "cores"),
    [
        ("0::/", {"cpu.max": "150000 100000"}, 2),
        ("0::/", {"cpu.max": "max 100000"}, 8),
        ("0::/", {"cpu.max": "10000 100000"}, 1),
        ("0::/", {"cpu.max": "9900000 100000"}, 8),
        ("0::/", {}, 8),
        ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "300000 100000"}, 3),
        ("0::/a/b", {"a/b/cpu.max": "200000 100000", "a/cpu.max": "300000 100000"}, 2),
        ("0::/host/path", {"cpu.max": "400000 100000"}, 4),
        ("4:cpu,cpuacct:/", V1, 8),
        ("4:cpu,cpuacct:/", {**V1, "cpu/cpu.cfs_quota_us": "250000"}, 3),
        ("1:cpu:/pod/a\n0::/", {"cpu/pod/cpu.cfs_quota_us": "100000", "cpu/pod/cpu.cfs_period_us": "100000"}, 1),
        ("3:cpuset:/\n2:memory:/x", {"cpuset/cpu.max": "100000 100000"}, 8),
        ("0::/", {"cpu.max": "nonsense"}, 8),
    ],
)
def test_usable_cpus_are_those_of_the_container(
    group: str, files: dict[str, str], cores: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)), raising=False)
    for name, text in {"proc/self/cgroup": group, **{f"sys/fs/cgroup/{k}": v for k, v in files.items()}}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert usable_cpus(tmp_path) == cores


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="affinity is Linux's")
def test_usable_cpus_follow_affinity() -> None:
    code = "import os; os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})\n"
    code += "from trace_sdk.machine import usable_cpus; print(usable_cpus())"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "1\n"


def test_peak_memory_is_this_processs_own() -> None:
    code = "from trace_sdk.machine import peak_memory as peak; a = peak(); b = bytearray(200 << 20); print(a, peak())"
    hold = np.ones(400 << 20, np.uint8)  # a child must not report its parent's
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    before, after = map(int, said.split())
    assert before < 100 << 20 and after - before == pytest.approx(200 << 20, rel=0.05)
    assert peak_memory() > hold.nbytes


def test_the_machine_is_named() -> None:
    about = hardware()
    assert about["cpu"] and 1 <= int(about["usable_cores"]) <= int(about["cores"])
    assert set(versions(["numpy", "no-such-package"])) == {"python", "numpy"}
    assert commit() is None or len(str(commit()).removesuffix("+changes")) == 40


def test_a_checkout_that_it_is_only_installed_in_is_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    author = ("-c", "user.name=a", "-c", "user.email=a@b.invalid")
    for words in (("init", "-q"), (*author, "commit", "-q", "--allow-empty", "-m", "theirs")):
        subprocess.run(["git", *words], cwd=tmp_path, check=True)
    installed = tmp_path / ".venv/lib/trace_sdk/machine.py"
    installed.parent.mkdir(parents=True)
    installed.touch()
    monkeypatch.setattr("trace_sdk.machine.__file__", str(installed))
    assert commit() is None


def test_without_a_home_the_cache_has_to_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", nowhere)
    for name in ("TRACE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(OutputError, match="Set TRACE_CACHE"):
        cache_folder()
    said = CliRunner().invoke(main, ["doctor", "--json"])
    assert said.exit_code == 0 and "Set TRACE_CACHE" in said.stdout
    monkeypatch.setenv("XDG_CACHE_HOME", "/all")
    assert cache_folder() == Path("/all/trace-sdk")
    monkeypatch.setenv("TRACE_CACHE", "/kept")
    assert cache_folder() == Path("/kept")
