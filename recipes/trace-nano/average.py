"""Average two students, the second trained on from the first: most of what it gained and of what it gave up stays.

python recipes/trace-nano/average.py FIRST SECOND PHOTOS… --cutouts CUTOUTS -o OUT

FIRST and SECOND are folders of convolutional students. How sure the mean is, and its threshold, are settled as by
`trace-sdk self-train`.
"""

import argparse
from pathlib import Path

import torch

from trace_sdk.atomic import make_folder
from trace_sdk.cli.console import run_script
from trace_sdk.student.nano import NanoStudent
from trace_sdk.student.own_scenes import OwnScenes
from trace_sdk.student.self_train import SelfTrainSettings, calibrate


def main() -> None:
    """Half of each, in every weight."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("first", type=Path)
    parser.add_argument("second", type=Path)
    parser.add_argument("photos", nargs="+", type=Path)
    parser.add_argument("--cutouts", type=Path, required=True)
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    before, mean = NanoStudent.load(options.first), average(options.first, options.second)
    make_folder(options.out)
    scenes = OwnScenes(options.photos, [options.cutouts], seed=7)
    calibrate(before, mean, scenes, SelfTrainSettings(size=256, seed=7))
    mean.save(options.out, {"mean_of": [options.first.name, options.second.name]})


def average(first: Path, second: Path) -> NanoStudent:
    """The student whose weights are the means of both."""
    mean, other = NanoStudent.load(first), NanoStudent.load(second).state_dict()
    with torch.no_grad():
        for name, value in mean.state_dict().items():
            if value.is_floating_point():
                value.lerp_(other[name], 0.5)
    return mean


if __name__ == "__main__":
    run_script(main)
