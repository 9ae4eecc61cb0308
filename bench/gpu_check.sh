#!/usr/bin/env bash
# Builds in place, tests, sanitizes and measures on this machine's GPU. Installs nothing, needs no network.
#
#   bench/gpu_check.sh                                      all parts, in under thirteen minutes
#   ONLY="tests bench" OUT=logs bench/gpu_check.sh          some parts: build, tests, sanitizer, bench
#   BENCH="--rounds 10" LIMIT_BENCH=1800 bench/gpu_check.sh     the whole benchmark
#
# OUT: folder of logs and JSON. PYTHON: interpreter. BENCH: arguments of the benchmark. LIMIT_*: seconds of a part.
# Every part runs, whatever became of those before it; the exit code is 0 only if all of them passed.
# shellcheck disable=SC2329 # functions are called by name
set -uo pipefail
cd "$(dirname "$0")/.." || exit 1

OUT=${OUT:-bench/results/gpu}
PYTHON=${PYTHON:-python3}
ONLY=${ONLY:-build tests sanitizer bench}
BENCH=${BENCH:---quick --rounds 10}
PATH=$PATH:/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer
export PYTHONUNBUFFERED=1 TWINS_FAST_CACHE=$OUT/cache

for word in $ONLY; do
  case $word in
    build | tests | sanitizer | bench) ;;
    *) echo "ONLY: no part named '$word'; there are build, tests, sanitizer, bench" >&2; exit 2 ;;
  esac
done
mkdir -p "$OUT" || exit 1

failed=0
summary=$(printf '%-10s %-6s %7s  %s' part result seconds notes)

# One line of the table: name, result, seconds, notes.
row() {
  [ "$2" = pass ] || failed=1
  summary+=$'\n'$(printf '%-10s %-6s %7s  %s' "$@")
  echo "== $1: $2 $4"
}

wanted() { [[ " $ONLY " == *" $1 "* ]]; }

# The last line of Python code that fails; nothing if it does not.
complaint() {
  local said
  said=$("$PYTHON" -c "$1" 2>&1) || tail -n 1 <<< "${said:-$PYTHON failed}"
}
no_gpu() { complaint 'import torch; torch.cuda.is_available() or exit("no CUDA device that PyTorch can use")'; }
no_nvcc() { [ -x "${CUDA_HOME:-}/bin/nvcc" ] || command -v nvcc > /dev/null || echo "no nvcc on PATH or in CUDA_HOME"; }
no_sanitizer() { command -v compute-sanitizer > /dev/null || echo "no compute-sanitizer on PATH or in /usr/local/cuda"; }
no_module() {
  complaint 'import torch; from twins_fast import _C; _C.has_cuda or exit("twins_fast._C was built without CUDA")'
}

# Runs a part: name, limit in seconds, what the log must hold (may be empty), what it needs, command.
part() {
  local name=$1 limit=$2 expected=$3 needs=$4 log="$OUT/$1.log" start=$SECONDS need reason code
  shift 4
  for need in $needs; do
    reason=$("$need")
    if [ -n "$reason" ]; then
      row "$name" FAIL 0 "$reason"
      return
    fi
  done
  echo "== $name, at most $limit s"
  timeout --kill-after=10 "$limit" "$@" 2>&1 | tee "$log"
  code=${PIPESTATUS[0]}
  if [ "$code" -eq 124 ] || [ "$code" -eq 137 ]; then
    row "$name" FAIL $((SECONDS - start)) "stopped at its limit of $limit s, $log"
  elif [ "$code" -ne 0 ]; then
    row "$name" FAIL $((SECONDS - start)) "exit code $code, $log: $(tail -n 1 "$log")"
  elif ! grep -q -- "$expected" "$log"; then
    row "$name" FAIL $((SECONDS - start)) "nothing like '$expected' in $log"
  else
    row "$name" pass $((SECONDS - start)) "$log"
  fi
}

build() {
  "$PYTHON" setup.py build_ext --inplace || return
  local reason
  reason=$(no_module)
  [ -z "$reason" ] || { echo "$reason"; return 1; }
}

if wanted build; then
  export -f build no_module complaint
  export PYTHON
  part build "${LIMIT_BUILD:-90}" "" no_nvcc bash -c build
fi
if wanted tests; then
  part tests "${LIMIT_TESTS:-300}" "[0-9] passed" "no_gpu no_module" "$PYTHON" -m pytest -q -m gpu tests
fi
if wanted sanitizer; then
  # Each tensor gets an allocation of its own, so that memcheck sees where it ends.
  export PYTORCH_NO_CUDA_MEMORY_CACHING=1
  for tool in memcheck racecheck synccheck; do
    part "$tool" "${LIMIT_SANITIZER:-70}" "SUMMARY: 0 " "no_gpu no_sanitizer no_module" \
      compute-sanitizer --tool "$tool" --error-exitcode 9 --print-limit 20 "$PYTHON" -m bench.sanitize
  done
  unset PYTORCH_NO_CUDA_MEMORY_CACHING
fi
if wanted bench; then
  # shellcheck disable=SC2086 # BENCH is several arguments
  part bench "${LIMIT_BENCH:-140}" "" "no_gpu no_module" \
    "$PYTHON" -m bench.twin_bn --device cuda --out "$OUT" $BENCH
fi

printf '\n%s\n' "$summary" | tee "$OUT/summary.txt"
exit $failed
