#!/usr/bin/env bash
# On a machine with a GPU: build, test, sanitize and benchmark, in that order. Logs and results go to $OUT
# (default: benchmarks/results). Steps may be chosen: benchmarks/gpu.sh build test sanitize bench sweep networks
set -uo pipefail
cd "$(dirname "$0")/.."
out=${OUT:-benchmarks/results}
mkdir -p "$out"
steps=${*:-build test sanitize bench}
failed=0
step() { # name, command...
  local name=$1 start=$SECONDS
  shift
  "$@" >"$out/$name.log" 2>&1
  local rc=$?
  tail -n "${TAIL:-15}" "$out/$name.log"
  echo "== $name: exit $rc after $((SECONDS - start)) s"
  [ $rc -eq 0 ] || failed=1
}
for name in $steps; do
  case $name in
    build) DIFFMF_CUDA=on step build python3 -m pip install --no-build-isolation --no-deps -v -e . ;;
    test) step test python3 -m pytest tests -q --durations=5 ;;
    sanitize)
      # Few examples: under the sanitizer a launch takes seconds. initcheck sees buffers torch reuses only when its
      # caching allocator is off.
      export DIFFMF_EXAMPLES=6 PYTORCH_NO_CUDA_MEMORY_CACHING=1
      for tool in memcheck racecheck initcheck synccheck; do
        step "$tool" compute-sanitizer --tool "$tool" --kernel-name-exclude kernel_substring=at:: \
          --error-exitcode 9 python3 -m pytest tests/test_ss2d.py tests/test_selective_scan.py tests/test_cross_scan.py \
          tests/test_depthwise_conv_silu.py tests/test_norm_gate.py \
          -q -k "cuda and (matches or match_the or bits or last_state)"
      done
      unset DIFFMF_EXAMPLES PYTORCH_NO_CUDA_MEMORY_CACHING
      ;;
    bench) step bench python3 -m diffmf_model bench --output "$out" ;; # beside the peers on PYTHONPATH
    sweep)
      step sweep python3 -m diffmf_model bench sweep --seconds 0.15 --output "$out"
      step length python3 -m diffmf_model bench length --seconds 0.15 --output "$out"
      ;;
    networks) step networks python3 benchmarks/networks.py --output "$out" ;; # needs other people's on PYTHONPATH
    *) echo "unknown step $name; expected build, test, sanitize, bench, sweep or networks" && exit 2 ;;
  esac
done
exit $failed
