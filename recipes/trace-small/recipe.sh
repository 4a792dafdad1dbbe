#!/usr/bin/env bash
# Makes the engine trace-small, one command a stage; each goes on where it was cut, so run it again after a stop.
#
#   recipes/trace-small/recipe.sh WORK cpu     the engine in the package: 8 blocks × 4 heads, hours on two cores
#   recipes/trace-small/recipe.sh WORK cuda    full size: 12 blocks × 6 heads, 27.5 M parameters, about an hour
#
# WORK holds photos/, train/ and held-out/ (see README.md beside this file), and for "cpu" pixel-8x256/ to start from.
set -euo pipefail
work=$1
device=$2
here=$(cd "$(dirname "$0")" && pwd)

case $device in
  cpu)
    pretrain=(--layers 8 --heads 4 --start "$work/pixel-8x256" --tokens 16384 --size 128 --size 128 --size 192 --size 256
      --optimizer muon --learning-rate 1.2e-3 --warmup 30 --ema 0.995 --steps 430 --seed 1)
    scenes=170 photos=170
    crops=(--tokens 6400 --size 256 --size 320)
    joint=(--steps 340 --lora-from 0.85)
    decoder=(--steps 620 --lora-from 1)
    ;;
  cuda)
    pretrain=(--layers 12 --heads 6 --tokens 262144 --size 256 --learning-rate 7e-4 --steps 12000)
    scenes=6000 photos=5609
    crops=(--tokens 65536)
    joint=(--steps 6000 --lora-from 0.3)
    decoder=(--steps 8000 --lora-from 1)
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
for part in scenes photos; do
  trace-sdk label "$work/distil/$part" --backbone "$work/backbone" -o "$work/labels/$part" --size 448 \
    --form log-per-head -t 0.2 -t 0.4 --precision bf16 --device "$device"
done

# First decoder and LoRA, then the decoder alone on the backbone that LoRA left.
for stage in joint decoder; do
  declare -n settings=$stage
  trace-sdk distill "$work/distil" --labels "$work/labels" --backbone "$work/backbone" "${crops[@]}" "${settings[@]}" \
    --device "$device" -o "$work/student"
done
trace-sdk export "$work/student" -o "$work/trace-small.onnx" --name trace-small

python "$here/compose_scenes.py" "$work/held-out" "$work/scenes" --count 60 --seed 7 --ids
trace-sdk evaluate "$work/scenes" --engine "$work/trace-small.onnx" -o "$work/quality"
