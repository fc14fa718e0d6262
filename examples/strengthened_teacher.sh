#!/usr/bin/env bash
# A teacher that another program has made better: TRL's GRPO trains the quickstart's code teacher for what
# Python's parser accepts, the gate measures it, and the quickstart's recipe injects it. No GPU.
#
#   bash examples/quickstart.sh               first: student, teacher, text, routing profile
#   TRL_PYTHON=... bash examples/strengthened_teacher.sh
#
# TRL_PYTHON is the python of an environment that has TRL (python -m venv trl && trl/bin/pip install trl).
# Everything it writes is in runs/strengthened_teacher (OUT=... for another folder, QUICKSTART=... for the
# quickstart's). It ends with three tables; examples/strengthened_teacher/README.md says what they mean.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source examples/environment.sh
source examples/quickstart/flags.sh
export OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONWARNINGS=ignore TOKENIZERS_PARALLELISM=false

quickstart=${QUICKSTART:-runs/quickstart}
out=${OUT:-runs/strengthened_teacher}
example=examples/strengthened_teacher
data=$quickstart/data
trl=${TRL_PYTHON:-$PYTHON}
grpo_steps=${GRPO_STEPS:-60}
steps=${STEPS:-40}

if [ ! -e "$quickstart/profile.json" ]; then
  echo "$quickstart/profile.json is not there: run examples/quickstart.sh first, or name its folder with QUICKSTART" >&2
  exit 2
fi
if ! "$trl" -c 'import trl' >/dev/null 2>&1; then
  echo "$trl has no TRL: name a python that has with TRL_PYTHON (pip install trl)" >&2
  exit 2
fi
mkdir -p "$out"

say() { printf '[%4d s] %s\n' "$SECONDS" "$*"; }
logged() { # LOG COMMAND...: shows the end of the log when the command fails
  local log=$1
  shift
  "$@" >"$log" 2>&1 || { tail -n 25 "$log" >&2; echo "failed; the whole log is $log" >&2; exit 1; }
}
moe_inject() {
  "$PYTHON" -m megatron_moe_inject.cli "$@"
}
as_folder() { # CHECKPOINT NAME OUTPUT: a checkpoint of the quickstart as a Hugging Face folder
  rm -rf "$out/$3"
  logged "$out/export-$3.log" moe_inject export-hf "$1" --hf "$out/shapes/$2" --output "$out/$3"
}
SETTINGS=("domains[0].experts.profile=$quickstart/profile.json")
HELD_OUT_TEXT=(--valid-data-path 0.5 "$data/code_held_out" 0.5 "$data/english_held_out")

say "the teacher as a Hugging Face folder"
logged "$out/shapes.log" "$PYTHON" "$example/folders.py" "$out/shapes"
as_folder "$quickstart/teacher" teacher teacher

say "$grpo_steps steps of GRPO"
rm -rf "$out/strengthened"
logged "$out/grpo.log" "$trl" "$example/grpo.py" "$out/teacher" "$out/strengthened" --steps "$grpo_steps"

# The quickstart's injection from a teacher; the gate compares it with the student before the first step.
inject() { # TEACHER
  rm -rf "$out/injected-$1" "$out/merged-$1"
  logged "$out/inject-$1.log" megatron "${STUDENT[@]}" "${BOTH[@]}" "${TRAINING[@]}" \
    --inject-recipe "$HERE/recipe.yaml" --inject-verify-frozen \
    --inject-set "teachers.coder.source=hf:$out/$1" "${SETTINGS[@]}" "evaluation={}" \
    --expert-model-parallel-size "${PROCESSES:-2}" \
    --train-data-path 0.9 "$data/code_slice" 0.1 "$data/english_slice" "${HELD_OUT_TEXT[@]}" \
    --data-cache-path "$out/cache-inject" --train-iters "$steps" --lr 1e-3 --min-lr 1e-4 \
    --eval-interval "$steps" --eval-iters 25 --load "$quickstart/student" --finetune --no-load-optim --no-load-rng \
    --save "$out/injected-$1" --save-interval "$steps"
  grep -ah "teacher gate" "$out/inject-$1.log"
  logged "$out/merge-$1.log" moe_inject merge-adapters --trained "$out/injected-$1" --output "$out/merged-$1"
  as_folder "$out/merged-$1" student "student-by-$1"
}

for teacher in teacher strengthened; do
  say "injecting from $teacher: $steps steps of the quickstart's recipe"
  inject "$teacher"
  moe_inject compare "$out/injected-$teacher"/inject_evaluation.jsonl{,}
done

say "held-out prompts: how much of what each writes parses"
as_folder "$quickstart/student" student student
"$PYTHON" "$example/reward.py" "$out"/{teacher,strengthened,student,student-by-teacher,student-by-strengthened}
say "done"
