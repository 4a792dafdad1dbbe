#!/usr/bin/env bash
# Makes the engine trace-small, one command a stage; each goes on where it was cut, so run it again after a stop.
#
#   recipes/trace-small/recipe.sh WORK cpu     the engine in the package: 8 blocks × 4 heads, hours on two cores
#   recipes/trace-small/recipe.sh WORK cuda    full size: 12 blocks × 6 heads, 27.5 M parameters, a quarter of an hour
#
# WORK holds photos/, train/ and held-out/ (see README.md beside this file), and for "cpu" pixel-8x256/ to start from.
set -euo pipefail
work=$1
device=$2
here=$(cd "$(dirname "$0")" && pwd)

case $device in
  cpu)
    pretrain=(--layers 8 --heads 4 --start "$work/pixel-8x256" --tokens 16384 --size 128 --size 128 --size 192 --size 256
      --optimizer muon --learning-rate 1.2e-3 --warmup 30 --ema 0.995 --steps 160 --seed 1)
    scenes=220 photos=220
    blocks=(--block 2 --block 3 --block 4 --block 5 --block 6)
    crops=(--tokens 4800 --size 256 --size 320 --batches 150)
    joint=(--steps 140 --lora-from 0.8)
    decoder=(--steps 1100 --lora-from 1)
    stages=(joint decoder)
    share=0.85
    ;;
  cuda)
    # As run on an H200, 15 minutes in all: docs/experiments.md, "A larger backbone, on a GPU".
    pretrain=(--layers 12 --heads 6 --tokens 131072 --size 256 --optimizer muon --learning-rate 1.5e-3 --warmup 100
      --ema 0.998 --steps 1800 --workers 15)
    scenes=1000 photos=1400
    blocks=(--block 2 --block 3 --block 4 --block 5 --block 6 --block 7 --block 8)
    crops=(--tokens 65536 --size 192 --size 256 --size 320 --workers 15)
    joint=(--steps 200 --lora-from 0.3)
    stages=(joint)
    share=0.8
    ;;
  *)
    echo "the second argument is cpu or cuda" >&2
    exit 2
    ;;
esac

trace-sdk pretrain "$work/photos" "$work/train/backgrounds" --cutouts "$work/train/cutouts" \
  --backgrounds "$work/train/backgrounds" "${pretrain[@]}" --device "$device" -o "$work/backbone"

python "$here/compose_scenes.py" "$work/train" "$work/distil/scenes" --count "$scenes"
python "$here/sample_photos.py" "$work/photos" "$work/distil/photos" --count "$photos"
# Photos are read at a finer scale than scenes of 256 px, both in windows as large as the crops of pretraining.
for part in scenes:448 photos:800; do
  trace-sdk label "$work/distil/${part%:*}" --backbone "$work/backbone" -o "$work/labels/${part%:*}" \
    --size "${part#*:}" --tile 256 --form log-per-head -t 0.2 "${blocks[@]}" --precision bf16 --device "$device"
done

# First decoder and LoRA, then the decoder alone on the backbone that LoRA left.
for stage in "${stages[@]}"; do
  declare -n settings=$stage
  trace-sdk distill "$work/distil" --labels "$work/labels" --backbone "$work/backbone" "${crops[@]}" "${settings[@]}" \
    --device "$device" -o "$work/student"
done
student=$work/student
if [ "$device" = cuda ]; then
  # Then all of it, LoRA included, by scenes of what trace-nano cuts out; too slow without a GPU.
  python "$here/sample_photos.py" "$work/photos" "$work/own" --count 2500
  trace-sdk cutouts "$work/own" --engine trace-nano --size 384 -o "$work/cutouts"
  mkdir -p "$work/sharp" # every folder counts the same, and these photos are the varied ones
  cp -n "$work"/photos/cid22-* "$work"/photos/cq100-* "$work/sharp"
  trace-sdk self-train "$student" "$work/photos" "$work/sharp" --cutouts "$work/cutouts" --lora-rank 64 \
    --crops 64 --size 256 --steps 550 --workers 15 --device cuda -o "$work/better"
  student=$work/better
fi
# With trace-nano, which looks at the photo at twice the size. The better the backbone, the less of it.
trace-sdk combine "$student" "$here/../trace-nano/weights" --share "$share" -o "$work/combined"
trace-sdk export "$work/combined" -o "$work/trace-small.onnx" --name trace-small --default-size 768

python "$here/compose_scenes.py" "$work/held-out" "$work/scenes" --count 60 --seed 7 --ids
trace-sdk evaluate "$work/scenes" --engine "$work/trace-small.onnx" -o "$work/quality"
