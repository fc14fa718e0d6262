#!/usr/bin/env bash
# What needs a GPU, on one Hopper GPU: correctness first, then speed; the tables come last.
#
#   bash tests/gpu/run.sh                     with the packages that are installed
#   WHEELS=DIR bash tests/gpu/run.sh          a bare machine: unpacks the wheels in DIR first
#   bash tests/gpu/run.sh --tp 1 --repeats 3  arguments go to loss_bench.py
#   PARTS=features bash tests/gpu/run.sh      what has not run on a GPU yet: checks, then times of a step
#                                             (meant for 10 minutes, which has not been measured)
#
# Further variables: PYTHON (python3), SITE, the folder that the wheels are unpacked into (a new one),
# RESULTS, a folder for the figures as JSON (none), PARTS, what to do, in this order (tests precision rows
# loss overlap step; features, too, where it is named), TESTS, the tests (tests/gpu), GPU_RUNS, a regular
# expression over the names of training runs (all), GPU_MODELS, a folder that keeps the small models they
# start from, QUICKSTART, the folder of a finished quickstart, on whose data precisions are compared (not
# done without), and NCCL_LIBRARY, the path of a libnccl.so.2 of version 2.30 or newer, with which two
# processes can share a device (else layouts of two want two devices or a newer torch). Nothing is timed
# unless the tests pass, but for features.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
PYTHON=${PYTHON:-python3}

path=$PWD
if [ -n "${WHEELS:-}" ]; then
  SITE=${SITE:-$(mktemp -d)}
  # One call: a second one would replace folders that several wheels share.
  "$PYTHON" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --upgrade \
    --target "$SITE" "$WHEELS"/*.whl
  path=$SITE:$path
fi
export PYTHONPATH=$path${PYTHONPATH:+:$PYTHONPATH} NVTE_FRAMEWORK=pytorch PYTHONWARNINGS=ignore
[ -z "${RESULTS:-}" ] || mkdir -p "$RESULTS"

"$PYTHON" - <<'CHECK'
import importlib.util
import torch

assert torch.cuda.is_available(), "run.sh needs a CUDA device; torch sees none"
for name in ("triton", "liger_kernel", "megatron.core", "omegaconf", "transformer_engine", "apex"):
    try:
        found = importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        found = False
    print(f"{name}: {'found' if found else 'missing'}")
print(f"torch {torch.__version__}, {torch.cuda.get_device_name()}")
CHECK

bench=examples/benchmarks
for part in ${PARTS:-tests precision rows loss overlap step}; do
  json=()
  [ -z "${RESULTS:-}" ] || json=(--json "$RESULTS/$part.json")
  echo "== $part, after $SECONDS s"
  case $part in
    tests) "$PYTHON" -m pytest -q -m gpu ${TESTS:-tests/gpu} ;;
    features)
      failed=0
      "$PYTHON" -m pytest -q -s -m gpu tests/gpu/test_features.py || failed=$?
      "$PYTHON" $bench/gpu/step_bench.py --precisions bf16 --steps 4 --warm-up 2 --traced 0 --together 10 \
        --arms stock freeze kd bare adapters grouped domain retained imitated everything "${json[@]}"
      [ "$failed" = 0 ] || exit "$failed" ;;
    precision)
      [ -z "${QUICKSTART:-}" ] || "$PYTHON" $bench/gpu/precision_curves.py "$QUICKSTART" \
        --work "$(mktemp -d)" "${json[@]}" ${RESULTS:+--plot "$RESULTS/$part.png"} ;;
    rows) "$PYTHON" $bench/row_bench.py "${json[@]}" ;;
    loss) "$PYTHON" $bench/loss_bench.py --device cuda "${json[@]}" "$@" ;;
    overlap) "$PYTHON" $bench/gpu/overlap_bench.py "${json[@]}" ;;
    step) "$PYTHON" $bench/gpu/step_bench.py "${json[@]}" ;;
    *) echo "run.sh: PARTS names no part $part" >&2; exit 2 ;;
  esac
done
