"""Take a fixed sample of a folder of photos.

    python recipes/trace-small/sample_photos.py WORK/photos OUT --count 350

Every source (the part of the name before "-") gives the same number, as far as it has them.
"""

import argparse
from pathlib import Path

import numpy as np

from trace_sdk.atomic import write_bytes
from trace_sdk.cli.console import at_least, run_script
from trace_sdk.pretraining.photos import list_photos


def main() -> None:
    """Copies; the same sample for the same seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("photos", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--count", type=at_least(1), required=True)
    parser.add_argument("--seed", type=at_least(0), default=0)
    options = parser.parse_args()
    for file in sample(list_photos([options.photos]), options.count, options.seed):
        write_bytes(options.out / file.relative_to(options.photos), file.read_bytes())


def sample(files: list[Path], count: int, seed: int) -> list[Path]:
    """Round after round, one random photo of each source that still has one."""
    rng = np.random.default_rng(seed)
    sources: dict[str, list[Path]] = {}
    for file in files:
        sources.setdefault(file.name.partition("-")[0], []).append(file)
    decks = [[deck[i] for i in rng.permutation(len(deck))] for _, deck in sorted(sources.items())]
    taken: list[Path] = []
    while len(taken) < min(count, len(files)):
        for deck in decks:
            if deck and len(taken) < count:
                taken.append(deck.pop())
    return taken


if __name__ == "__main__":
    run_script(main)
