"""Write an untrained backbone of the small shape: the control that every figure is compared with.

python recipes/trace-small/random_backbone.py OUT
"""

import sys

import torch

from trace_sdk.backbones.pixel import SMALL, PixelBackbone

if __name__ == "__main__":
    torch.manual_seed(0)
    PixelBackbone.create(**SMALL).save(sys.argv[1])
