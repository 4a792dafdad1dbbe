"""What this process runs on: cores it may use, memory it took, hardware, versions and commit for reports."""

from __future__ import annotations

import importlib.metadata
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath

from trace_sdk.errors import OutputError


def usable_cpus(root: Path = Path("/")) -> int:
    """CPU cores that this process may use: its affinity, and the quota of every control group (v1 and v2) around it.

    A container with a quota of 1.5 cores gets 2 threads, however many cores its machine has.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min([cores, *(math.ceil(quota) for quota in _quotas(root))]))


def cache_folder() -> Path:
    """Where what took long to make is kept: $TRACE_CACHE, or trace-sdk in $XDG_CACHE_HOME, which is ~/.cache if unset.

    Raises:
        OutputError: none of these is known.
    """
    if named := os.environ.get("TRACE_CACHE"):
        return Path(named)
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "trace-sdk"
    except RuntimeError:  # a container's user without HOME or an entry in passwd
        raise OutputError(
            "This user has no home folder to keep built engines and prompts in. Set TRACE_CACHE to a folder."
        ) from None


def _quotas(root: Path) -> Iterator[float]:
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / "sys/fs/cgroup" / ("cpu" if controllers else "")
        group = PurePosixPath(path)
        # A limit of a parent holds too; inside a container only the mount's own folder may be visible.
        for folder in (group, *group.parents):
            yield from _quota(mount / folder.relative_to("/"), version=1 if controllers else 2)


def _quota(folder: Path, version: int) -> Iterator[float]:
    names = ("cpu.max",) if version == 2 else ("cpu.cfs_quota_us", "cpu.cfs_period_us")
    try:
        quota, period = " ".join((folder / name).read_text() for name in names).split()
        cores = int(quota) / int(period)
    except (OSError, ValueError):  # no such limit; "max"
        return
    if cores > 0:
        yield cores


def peak_memory() -> int:
    """The most memory (resident set) that this process has held so far, bytes."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.partition("VmHWM:")[2].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        import resource

        # Elsewhere than on Linux; macOS counts in bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def hardware() -> dict[str, str | int]:
    """machine, cpu (the processor's name), cores of the machine, and usable_cores of this process."""
    return {
        "machine": platform.machine(),
        "cpu": _cpu(),
        "cores": os.cpu_count() or 1,
        "usable_cores": usable_cpus(),
    }


def gpus() -> list[str]:
    """NVIDIA GPUs with their memory and driver, as nvidia-smi tells; none where it is missing or fails."""
    command = ["nvidia-smi", "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in told.splitlines() if line.strip()]


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Of Python and of those packages that are installed."""
    found = {"python": platform.python_version()}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Of the checkout this code runs from, "+changes" where files differ from it; None when installed, also where that
    is somewhere in a checkout of something else.
    """
    here = Path(__file__)
    try:
        subprocess.run(
            ["git", "ls-files", "--error-unmatch", here.name],
            cwd=here.parent, capture_output=True, check=True, timeout=10,
        )  # fmt: skip
        described = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--exclude=*", "--dirty=+changes"],
            cwd=here.parent,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return described.stdout.strip()


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
