"""Write an untrained backbone of the small shape: the control that every figure is compared with.

python recipes/trace-small/random_backbone.py OUT
"""

import argparse
from pathlib import Path

import torch

from trace_sdk.backbones.pixel import SMALL, PixelBackbone
from trace_sdk.cli.console import run_script


def main() -> None:
    """The same weights every time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(0)
    PixelBackbone.create(**SMALL).save(options.out)


if __name__ == "__main__":
    run_script(main)
