#!/usr/bin/env bash
# A GPU machine without a network, where commands have ten minutes each and one folder of few files comes back.
#
#     bench/gpu/offline.sh tests OUT      builds in place, runs tests/gpu in parallel
#     bench/gpu/offline.sh bench OUT      contenders and launch choices; peers' wheels lie in the folder WHEELS
#     bench/gpu/offline.sh profile OUT    compute-sanitizer and the profiler on the row kernels
#
# Installs nothing: extensions are built by setup.py, wheels are unpacked beside OUT and put on PYTHONPATH. OUT gets at most eight files:
# build.log, tests.log, DEVICE.{md,json,tuning.json}, bench.log, sanitizer.log, profile.txt.
# PYTHON picks the interpreter; SECONDS_LEFT the time of a command (default 560). DRIFT_GPU_REHEARSAL=1 goes as far as a CPU does.
set -u -o pipefail
cd "$(dirname "$0")/../.."
step=${1:?tests, bench or profile} out=${2:?a folder for the report}
python=${PYTHON:-python3} limit=${SECONDS_LEFT:-560} rehearsal=${DRIFT_GPU_REHEARSAL:-0}
mkdir -p "$out"
out=$(cd "$out" && pwd)
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
dry=(); [ "$rehearsal" = 1 ] && dry=(--dry-run)

build() {
  local capability
  capability=$("$python" -c "import torch; print('%d.%d' % torch.cuda.get_device_capability() if torch.cuda.is_available() else '')")
  {
    "$python" -c "import sys, torch; print(sys.version, 'torch', torch.__version__, 'CUDA', torch.version.cuda)"
    command -v nvidia-smi >/dev/null && nvidia-smi
    if [ -n "$capability" ]; then
      FORCE_CUDA=1 TORCH_CUDA_ARCH_LIST=$capability "$python" setup.py build_ext --inplace ||
        { echo "The CUDA library was not built: going on with Triton alone."; DRIFT_SKIP_CUDA_BUILD=1 "$python" setup.py build_ext --inplace; }
    else
      DRIFT_SKIP_CUDA_BUILD=1 "$python" setup.py build_ext --inplace
    fi
  } >"$out/build.log" 2>&1
}

case $step in
tests)
  build || { tail -20 "$out/build.log"; exit 1; }
  parallel=(); "$python" -c "import xdist" 2>/dev/null && parallel=(-n "$(($(nproc) < 8 ? $(nproc) : 8))")
  timeout "$limit" "$python" -m pytest tests/gpu -q -W default -p no:cacheprovider "${parallel[@]}" 2>&1 | tail -c 200000 | tee "$out/tests.log" | tail -15
  ;;
bench)
  if [ -n "${WHEELS:-}" ]; then
    peers=$(mktemp -d)
    for wheel in "$WHEELS"/*.whl; do "$python" -m zipfile -e "$wheel" "$peers" || echo "$wheel was not unpacked"; done
    export PYTHONPATH="$PYTHONPATH:$peers"
  fi
  "$python" -m bench.gpu --no-tests --seconds "$limit" --out "$out" "${dry[@]}" 2>&1 | tee "$out/bench.log" | tail -60
  ;;
profile)
  if [ "$rehearsal" = 1 ]; then device=cpu; else device=cuda; fi
  if command -v compute-sanitizer >/dev/null && [ "$device" = cuda ]; then
    for tool in memcheck racecheck; do
      timeout $((limit / 3)) compute-sanitizer --tool "$tool" "$python" -m bench.gpu.rows --device cuda --small 2>&1
    done >"$out/sanitizer.log"
  else
    echo "compute-sanitizer did not run: it is not on PATH, or there is no GPU" >"$out/sanitizer.log"
  fi
  timeout $((limit / 3)) "$python" -m bench.gpu.rows --device "$device" 2>&1 | tee "$out/profile.txt" | tail -40
  ;;
*)
  echo "$step must be tests, bench or profile" >&2
  exit 2
  ;;
esac
