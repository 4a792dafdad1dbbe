#!/usr/bin/env bash
# Makes the engine trace-nano, one command a stage; each goes on where it was cut, so run it again after a stop.
#
#   recipes/trace-nano/recipe.sh WORK
#
# WORK holds photos/, varied/, train/ and held-out/ (see recipes/trace-small/README.md). The teacher is the backbone of
# trace-small. About an hour and a half for the labels and four hours for the student on two CPU cores.
set -euo pipefail
work=$1
here=$(cd "$(dirname "$0")" && pwd)
small=$here/../trace-small

mkdir -p "$work/nano/images/photos"
while read -r name; do cp -n "$work/photos/$name" "$work/nano/images/photos/"; done <"$here/PHOTOS.txt"
python "$small/compose_scenes.py" "$work/train" "$work/nano/images/scenes" --count 600 --seed 11

for part in scenes:448 photos:800; do
  trace-sdk label "$work/nano/images/${part%:*}" --backbone "$small/weights/backbone" -o "$work/nano/labels/${part%:*}" \
    --size "${part#*:}" --tile 256 --form log-per-head -t 0.2 --block 2 --block 3 --block 4 --block 5 --block 6 \
    --precision bf16
done

trace-sdk distill-nano "$work/nano/images" --labels "$work/nano/labels" --steps 1900 -o "$work/nano/student"
trace-sdk export "$work/nano/student" -o "$work/nano/first.onnx" --name trace-nano

# Then by scenes of what it cuts out itself.
python "$small/sample_photos.py" "$work/photos" "$work/nano/own" --count 1500
trace-sdk cutouts "$work/nano/own" --engine "$work/nano/first.onnx" --size 384 -o "$work/nano/cutouts"
trace-sdk self-train "$work/nano/student" "$work/nano/own" --cutouts "$work/nano/cutouts" --steps 2000 \
  -o "$work/nano/better"

# Once more, on larger scenes of more photos, with what it cuts out by now; of the two the mean.
trace-sdk export "$work/nano/better" -o "$work/nano/second.onnx" --name trace-nano
python "$small/sample_photos.py" "$work/photos" "$work/nano/more" --count 2500
trace-sdk cutouts "$work/nano/more" --engine "$work/nano/second.onnx" --size 384 -o "$work/nano/more-cutouts"
trace-sdk self-train "$work/nano/better" "$work/nano/more" --cutouts "$work/nano/more-cutouts" \
  --steps 600 --size 256 --learning-rate 1e-3 --seed 7 -o "$work/nano/on"
python "$here/average.py" "$work/nano/better" "$work/nano/on" "$work/nano/more" \
  --cutouts "$work/nano/more-cutouts" -o "$work/nano/mean"

# And with the few photos that are varied and sharp in a folder of their own: every folder counts the same.
trace-sdk export "$work/nano/mean" -o "$work/nano/third.onnx" --name trace-nano
python "$small/sample_photos.py" "$work/photos" "$work/nano/many" --count 4000
mkdir -p "$work/nano/sharp"
cp -n "$work"/photos/cid22-* "$work"/photos/cq100-* "$work/nano/sharp"
trace-sdk cutouts "$work/nano/many" --engine "$work/nano/third.onnx" --size 384 -o "$work/nano/cutouts-many"
for size in 384 512 768; do
  trace-sdk cutouts "$work/nano/sharp" --engine "$work/nano/third.onnx" --size "$size" -o "$work/nano/cutouts-$size"
done
trace-sdk self-train "$work/nano/mean" "$work/nano/many" "$work/nano/sharp" --cutouts "$work/nano/cutouts-many" \
  --cutouts "$work/nano/cutouts-384" --cutouts "$work/nano/cutouts-512" --cutouts "$work/nano/cutouts-768" \
  --steps 2700 --size 256 --learning-rate 1e-3 --seed 7 -o "$work/nano/last"

# With as many varied photos again, from Debian packages; these and the sharp ones are cut by trace-small.
trace-sdk export "$work/nano/last" -o "$work/nano/fourth.onnx" --name trace-nano
trace-sdk combine "$small/weights/student" "$work/nano/last" --share 0.85 -o "$work/nano/both"
trace-sdk export "$work/nano/both" -o "$work/nano/both.onnx" --name trace-small --default-size 768
trace-sdk cutouts "$work/nano/many" --engine "$work/nano/fourth.onnx" --size 384 -o "$work/nano/last-cutouts/many"
cutouts=(--cutouts "$work/nano/last-cutouts/many")
for part in "$work/nano/sharp" "$work/varied"; do
  for size in 384 512 768; do
    into=$work/nano/last-cutouts/${part##*/}-$size
    trace-sdk cutouts "$part" --engine "$work/nano/both.onnx" --size "$size" -o "$into"
    cutouts+=(--cutouts "$into")
  done
done
trace-sdk self-train "$work/nano/last" "$work/nano/many" "$work/nano/sharp" "$work/varied" "${cutouts[@]}" \
  --steps 2400 --size 256 --learning-rate 1e-3 --seed 11 -o "$work/nano/varied"

# The same once more. These are the steps that had cut-outs at home and JPEG artefacts (docs/method.md).
trace-sdk self-train "$work/nano/varied" "$work/nano/many" "$work/nano/sharp" "$work/varied" "${cutouts[@]}" \
  --steps 3300 --size 256 --learning-rate 1e-3 --seed 22 -o "$work/nano/home"

# And twice more; the last steps had paint over their scenes, and the varied photos twice as often.
trace-sdk self-train "$work/nano/home" "$work/nano/many" "$work/nano/sharp" "$work/varied" "${cutouts[@]}" \
  --steps 2400 --size 256 --learning-rate 1e-3 --seed 33 -o "$work/nano/longer"
trace-sdk self-train "$work/nano/longer" "$work/nano/many" "$work/nano/sharp" "$work/varied" \
  "$work/nano/sharp" "$work/varied" "${cutouts[@]}" \
  --steps 1700 --size 256 --learning-rate 1e-3 --seed 55 -o "$work/nano/painted"
trace-sdk export "$work/nano/painted" -o "$work/trace-nano.onnx" --name trace-nano

python "$small/compose_scenes.py" "$work/held-out" "$work/scenes" --count 60 --seed 7 --ids
trace-sdk evaluate "$work/scenes" --engine "$work/trace-nano.onnx" -o "$work/nano/quality"
