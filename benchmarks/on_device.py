"""What the benchmarks of kernels, teacher and student sizes share: device, memory of a run, result files."""

from __future__ import annotations

import argparse
import json
import multiprocessing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from trace_sdk.atomic import write_text
from trace_sdk.machine import commit, hardware, peak_memory, versions

RESULTS = Path(__file__).parent / "results"


def options_of(about: str | None) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("-o", "--out", type=Path, default=RESULTS)
    return parser


def is_there(device: str) -> bool:
    """Whether there is such a device; if not, says so."""
    if device == "cpu" or torch.cuda.is_available():
        return True
    print("There is no CUDA device here. Run this on a machine that has one, or take --device cpu.")
    return False


def measured_on(device: str, packages: Sequence[str]) -> dict[str, Any]:
    """What a result says about where its figures come from."""
    return {
        "device": name_of(device),
        "hardware": hardware(),
        "versions": versions(packages),
        "commit": commit(),
    }


def keep(result: dict[str, Any], table: str, folder: Path, name: str, *, show: bool = True) -> None:
    """Write NAME.json and, with its table, NAME.md; print the table.

    What is kept after each part, not shown yet, is there if the rest is cut short.
    """
    write_text(folder / f"{name}.json", json.dumps(result, indent=2) + "\n")
    write_text(folder / f"{name}.md", table)
    if show:
        print(table)


def name_of(device: str) -> str:
    """The GPU's name, or the CPU's with the threads in use."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"{hardware()['cpu']}, threads: {torch.get_num_threads()}"


def peak_on_cuda(run: Callable[[], object]) -> float:
    """MiB that one run allocates at its peak beyond what is there already; it runs once before."""
    run()
    return peak_of_one(run)


def peak_of_one(run: Callable[[], object]) -> float:
    """The same of the first run."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def peak_on_cpu(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> float:
    """MiB by which the run that `prepare(*arguments)` gives raises the resident set, in a process of its own."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_raise_resident_set, args=(prepare, arguments, torch.get_num_threads(), sender))
    process.start()
    sender.close()  # so that a process that fails ends the wait
    mebibytes = float(receiver.recv())
    process.join()
    return mebibytes


def _raise_resident_set(
    prepare: Callable[..., Callable[[], object]], arguments: tuple[Any, ...], threads: int, sender: Any
) -> None:
    torch.set_num_threads(threads)
    torch.set_grad_enabled(False)
    run = prepare(*arguments)
    before = peak_memory()
    run()
    sender.send((peak_memory() - before) / 2**20)
