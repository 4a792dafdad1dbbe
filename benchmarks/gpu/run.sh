#!/usr/bin/env bash
# Everything that wants an NVIDIA GPU, on a machine that no package registry reaches, within a number of seconds.
#
#   benchmarks/gpu/run.sh SECONDS OUT [WHEELS [ORT_PARTS]]
#
# Run it from the repository's root. The machine has torch, Triton, pytest and pytest-xdist; WHEELS holds what it lacks
# (diffusers, importlib_metadata 8), ORT_PARTS what pack_onnxruntime.py wrote. Stages come in order of value, each with a
# limit of its own, and one that fails stops no other. OUT gets tables, JSON, logs and summary.txt. Start it by itself:
# what else the machine does is in the times, and half of these are the host's.
set -uo pipefail
seconds=$1 out=$2 wheels=${3:-} parts=${4:-}
root=$(pwd) site=$(mktemp -d) began=$SECONDS
mkdir -p "$out/logs"

# The package as it is installed: export/ and kernels/ inside trace_sdk/.
mkdir -p "$site/trace_sdk"
ln -s "$root"/trace_sdk/* "$root/export" "$root/kernels" "$site/trace_sdk/"
export PYTHONPATH=$site PYTHONUNBUFFERED=1
if [ -n "$wheels" ]; then
  python3 -m pip install --quiet --no-index --no-deps --no-compile --target "$site/wheels" "$wheels"/*.whl
  PYTHONPATH+=:$site/wheels
fi
if [ -n "$parts" ]; then
  mkdir "$site/onnxruntime"
  cat "$parts"/part-* | tar xJ -C "$site/onnxruntime"
  PYTHONPATH=$site:$site/onnxruntime:${PYTHONPATH#*:}
fi

stage() { # NAME MOST COMMAND...: at most MOST seconds, or what is left
  local name=$1 most=$2 start=$((SECONDS - began)) left
  shift 2
  left=$((seconds - start - 3))
  if ((left < 10)); then
    echo "== $name: no time left" | tee -a "$out/summary.txt"
    return
  fi
  timeout -k 2 $((most < left ? most : left)) "$@" >"$out/logs/$name.log" 2>&1
  echo "== $name: exit code $?, $start to $((SECONDS - began)) s" | tee -a "$out/summary.txt"
}

nvidia-smi --query-gpu=name,driver_version,memory.total --format=csv,noheader | tee "$out/summary.txt"
test=(python3 -P -m pytest -p no:cacheprovider -q --no-header -rfE)
# On an H200 with 16 cores: a student of SD 1.5's size is ready after 20 s and more, kernels take 25 s, engines 40 s.
stage students 110 python3 benchmarks/gpu_latency.py sd15:torch:512 sd15:torch:1024 --runs 100 -o "$out" --name gpu-sd15
stage sd35 120 python3 benchmarks/gpu_latency.py sd35-large:torch:512 sd35-large:torch:1024 --runs 20 -o "$out" --name gpu-sd35
stage teacher-sd15 60 python3 benchmarks/teacher.py --model SD1.5-512 --runs 3 --tolerance 0.2 -o "$out/sd15"
stage teacher-sd35 110 python3 benchmarks/teacher.py --model SD3.5-L-1024 --runs 1 --tolerance 0.2 --stride 200 -o "$out/sd35"
stage test-gpu 120 "${test[@]}" --timeout 60 tests/gpu
stage test-kernels 90 "${test[@]}" -n 8 --timeout 60 tests/kernels -k "triton or teacher"
stage compiled 240 python3 benchmarks/gpu_latency.py sd15:torch.compile:512 --runs 100 -o "$out" --name gpu-compiled
stage engines 60 python3 benchmarks/gpu_latency.py trace-small:onnxruntime:512 trace-nano:onnxruntime:512 \
  trace-small:onnxruntime:768 --runs 200 -o "$out" --name gpu-engines
stage kernels 60 python3 benchmarks/kernels.py --no-compile --runs 30 -o "$out"

{
  for log in "$out"/logs/*.log; do
    grep -E "passed|failed|^FAILED|^ERROR|Error" "$log" | tail -5 | cut -c1-220 | sed "s|^|$(basename "$log"): |"
  done
  cat "$out"/*.md "$out"/*/*.md
} >>"$out/summary.txt" 2>/dev/null
cat "$out/summary.txt"
