"""How often an edge pixel of probability p is one that people drew, in a picture.

python recipes/trace-nano/reliability.py DATASET OUT.png
"""

import argparse
import math
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from numpy.typing import NDArray
from scipy.ndimage import distance_transform_edt

from trace_sdk.atomic import write_whole
from trace_sdk.cli.console import run_script
from trace_sdk.engines import BUNDLED
from trace_sdk.evaluation.baselines import lab_gradient
from trace_sdk.evaluation.datasets import open_dataset
from trace_sdk.evaluation.edges import MAX_DIST
from trace_sdk.evaluation.methods import EngineMethod, Function, Method
from trace_sdk.thinning import thin_ridges

BINS = np.linspace(0, 1, 11)


def count(probability: NDArray[np.float32], truth: NDArray[np.bool_]) -> NDArray[np.float64]:
    """Of the thinned pixels in each bin of probability: how many, their sum, and how many lie near a drawn edge."""
    thinned = thin_ridges(probability)
    seen = thinned > 0
    distance = distance_transform_edt(~truth) if truth.any() else np.full(truth.shape, np.inf)
    near = (distance[seen] <= MAX_DIST * math.hypot(*truth.shape)).astype(np.float64)
    values = thinned[seen]
    return np.stack([np.histogram(values, BINS, weights=weight)[0] for weight in (np.ones_like(values), values, near)])


def main() -> None:
    """One line a method; on the diagonal a probability says what it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    dataset = open_dataset(options.dataset)
    methods: list[Method] = [
        *(EngineMethod(name, device="cpu") for name in BUNDLED),
        Function("lab-gradient", lab_gradient),
    ]
    figure, axes = plt.subplots(figsize=(5, 5), layout="constrained")
    axes.plot([0, 1], [0, 1], color="0.8")
    for method in methods:
        counts = sum(
            count(method.edges(dataset, sample), np.logical_or.reduce(sample.boundaries)) for sample in dataset
        )
        number, total, near = counts[:, counts[0] >= 500]  # pixels; fewer say nothing
        axes.plot(total / number, near / number, marker="o", label=method.name)
        print(method.name, *(f"{p:.2f}→{share:.2f}" for p, share in zip(total / number, near / number, strict=True)))
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="edge probability", ylabel="share that people drew")
    axes.legend()
    with write_whole(options.out) as file:
        figure.savefig(file, format="png", dpi=110)


if __name__ == "__main__":
    run_script(main)
