#!/usr/bin/env bash
# Moves a small code model's knowledge into an English mixture-of-experts model, by adapters on a few of
# its experts, with real Megatron-Core on two gloo processes. No GPU; 2 CPU cores; 7 to 15 minutes from nothing.
#
#   bash examples/quickstart.sh                   from the two models that this repository ships
#   bash examples/quickstart.sh --from-scratch    pretrains them first, about half an hour more
#
# Everything it writes is in runs/quickstart (OUT=... for another folder). Ends with a table and
# runs/quickstart/curves.png. The recipe is examples/quickstart/recipe.yaml.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/environment.sh
source examples/quickstart/flags.sh
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false

out=${OUT:-runs/quickstart}
data=$out/data
steps=${STEPS:-200}
mkdir -p "$out"
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

say() { printf '[%3d s] %s\n' "$SECONDS" "$*"; }
logged() { # LOG COMMAND...: shows the end of the log when the command fails
  local log=$1
  shift
  "$@" >"$log" 2>&1 || { tail -n 25 "$log" >&2; echo "failed; the whole log is $log" >&2; exit 1; }
}

progress() { # LOG: what the run that writes it last said of its progress, every few seconds
  local line last=
  while sleep 5 >/dev/null 2>&1; do
    line=$(grep -aoE '^(training: step [^[A-Z]*|(evaluation at|frozen check).*)' "$1" 2>/dev/null | tail -n 1 || true)
    [ "$line" = "$last" ] || say "  ${line#training: }"
    last=$line
  done
}

case "${1:-}" in
  "") ;;
  --from-scratch) bash examples/quickstart/pretrain_models.sh "$out/pretraining" ;;
  *) echo "usage: bash examples/quickstart.sh [--from-scratch]" >&2; exit 2 ;;
esac

rm -rf "$data" "$out"/{student,teacher,injected,merged,tensorboard} "$out"/{profile.json,routing.png,experts.yaml}
say "cutting English and code from the text that ships with Python"
logged "$out/corpora.log" "$PYTHON" "$HERE/corpora.py" "$data"

unpack() { # NAME ARCHITECTURE...
  logged "$out/unpack-$1.log" "$PYTHON" "$HERE/models.py" unpack "$1" "$out/$1" -- "${@:2}" "${BOTH[@]}"
}

evaluate() { # NAME CHECKPOINT FLAGS...: losses on held-out text into $out/NAME.log
  logged "$out/$1.log" megatron "${@:3}" "${BOTH[@]}" "${TRAINING[@]}" "${HELD_OUT[@]}" \
    --train-data-path "$data/code_slice" --valid-data-path "$data"/{code,english}_held_out \
    --data-cache-path "$data/cache-$1" --train-iters 1 --lr 1e-3 --eval-interval 1 \
    --load "$2" --finetune --no-load-optim --no-load-rng --skip-train
}

# Where the student sends code and English: 20 batches of each kind of training text.
profile() {
  local slices=(0.5 "$data/code_slice" 0.5 "$data/english_slice")
  logged "$out/profile.log" "$PYTHON" -m megatron_moe_inject.cli profile "$HERE/recipe.yaml" --cpu \
    --output "$out/profile.json" -- "${STUDENT[@]}" "${BOTH[@]}" "${TRAINING[@]}" \
    --train-data-path "${slices[@]}" --valid-data-path "${slices[@]}" \
    --data-cache-path "$data/cache-profile" --train-iters 1 --lr 1e-3 \
    --eval-interval 1 --eval-iters 40 \
    --load "$out/student" --finetune --no-load-optim --no-load-rng
}

prepare_student() {
  unpack student "${STUDENT[@]}"
  PROCESSES=1 evaluate before "$out/student" "${STUDENT[@]}"
  say "  student: evaluated"
  profile
  say "  student: profile recorded"
}

prepare_teacher() {
  unpack teacher "${TEACHER[@]}"
  PROCESSES=1 evaluate teacher "$out/teacher" "${TEACHER[@]}"
  say "  teacher: evaluated"
}

say "student and teacher: unpacking, evaluating on held-out text, profiling the student's routing"
prepare_student &
student=$!
prepare_teacher &
teacher=$!
wait "$student"
wait "$teacher"

say "the two experts of eight per layer that code uses more than English does"
"$PYTHON" -m megatron_moe_inject.cli select "$out/profile.json" --method top_n --n 2 --score contrast \
  --domain code --heat-map "$out/routing.png" --output "$out/experts.yaml"

say "injecting: $steps steps on 300 kB of code and 10 % English"
INJECT=(
  --inject-recipe "$HERE/recipe.yaml" --inject-verify-frozen
  --inject-set "teachers.coder.source=megatron:$out/teacher"
  "domains[0].experts.profile=$out/profile.json"
)
rm -f "$out/inject.log"
progress "$out/inject.log" &
watcher=$!
logged "$out/inject.log" megatron "${STUDENT[@]}" "${BOTH[@]}" "${TRAINING[@]}" "${INJECT[@]}" \
  --expert-model-parallel-size 2 \
  --train-data-path 0.9 "$data/code_slice" 0.1 "$data/english_slice" \
  --valid-data-path 0.5 "$data/code_held_out" 0.5 "$data/english_held_out" \
  --data-cache-path "$data/cache-inject" --train-iters "$steps" --lr 1e-3 --min-lr 1e-4 \
  --eval-interval 100 --eval-iters 26 \
  --load "$out/student" --finetune --no-load-optim --no-load-rng \
  --save "$out/injected" --save-interval "$steps" --tensorboard-dir "$out/tensorboard"
kill "$watcher"

say "merging the adapters into a checkpoint that stock Megatron reads"
rm -rf "$out/merged"
"$PYTHON" -m megatron_moe_inject.cli merge-adapters --trained "$out/injected" --output "$out/merged"

say "evaluating it"
evaluate after "$out/merged" --expert-model-parallel-size 2 "${STUDENT[@]}"

"$PYTHON" "$HERE/report.py" "$out"
say "done; log of every step, checkpoints and curves: $out"
