#!/usr/bin/env bash
# Makes the two models that the repository ships: about half an hour on 2 CPU cores.
#
#   bash examples/quickstart/pretrain_models.sh [FOLDER]        data, checkpoints and logs
#
# The student learns English, split over two processes by expert parallelism; the dense teacher learns
# code, with data parallelism. Then models/ is written again. ONLY=student or ONLY=teacher makes one.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
source examples/environment.sh
source examples/quickstart/flags.sh
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false
work=${1:-runs/pretraining}
mkdir -p "$work"
data=$work/data
[ -e "$data/manifest.json" ] || "$PYTHON" "$HERE/corpora.py" "$data" --pretraining

pretrain() { # NAME TRAINING-SET STEPS EXPERT-PARALLEL-SIZE ARCHITECTURE...
  local name=$1 text=$2 steps=$3 expert_parallel=$4
  shift 4
  echo "pretraining the $name for $steps steps; log: $work/$name.log"
  rm -rf "${work:?}/$name"
  megatron "$@" "${BOTH[@]}" "${TRAINING[@]}" "${HELD_OUT[@]}" \
    --expert-model-parallel-size "$expert_parallel" \
    --train-data-path "$data/$text" --valid-data-path "$data"/{code,english}_held_out \
    --data-cache-path "$data/cache" --train-iters "$steps" --lr 3e-3 --min-lr 1e-4 \
    --eval-interval 500 --save "$work/$name" --save-interval "$steps" --no-save-optim \
    >"$work/$name.log" 2>&1 || { tail -n 20 "$work/$name.log" >&2; return 1; }
  "$PYTHON" "$HERE/models.py" pack "$name" "$work/$name" "$work/$name.log" \
    -- "$@" "${BOTH[@]}" 2>"$work/pack.log" | tail -n 1
}

if [ "${ONLY:-student}" = student ]; then
  pretrain student english_train 1200 2 "${STUDENT[@]}"
fi
if [ "${ONLY:-teacher}" = teacher ]; then
  pretrain teacher code_train 900 1 "${TEACHER[@]}"
fi
