#!/usr/bin/env bash
# Makes the bundled engine trace-small, one command a stage. Every stage goes on where it was cut.
#   recipes/trace-small/recipe.sh WORK [cpu|cuda]
# WORK needs: photos/ (see README.md), train/ and held-out/ (unpack.py). With "cuda" the backbone is DESIGN 5's.
set -euo pipefail
work=$1
device=${2:-cpu}
here=$(dirname "$0")

if [ "$device" = cpu ]; then
  backbone=(--layers 8 --heads 4 --tokens 16384 --size 128 --size 128 --size 192 --size 256 --optimizer muon
    --learning-rate 1.2e-3 --warmup 30 --ema 0.995 --steps 560 --start "$work/pixel-8x256")
else
  backbone=(--layers 12 --heads 6 --tokens 262144 --size 256 --learning-rate 7e-4 --steps 12000)
fi

trace-sdk pretrain "$work/photos" "$work/train/backgrounds" --cutouts "$work/train/cutouts" \
  --backgrounds "$work/train/backgrounds" "${backbone[@]}" --device "$device" -o "$work/backbone"
