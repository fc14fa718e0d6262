# What the scripts of every model do: source ../steps.sh STEP ARGUMENTS..., in the model's folder, whose model.sh
# says what is the model's own. README.md explains the variables. Arguments of profile, plan and train are added
# to Megatron's flags, where the last of a kind counts.
set -euo pipefail
# shellcheck source=/dev/null
source model.sh

PYTHON=${PYTHON:-python}
WORK=${WORK:-../../../runs/models}              # all that is written
HF=${HF:-$WORK/hf/$NAME}                        # the student as it was published
TEACHER=${TEACHER:-$WORK/hf/teacher}            # a dense model with the student's tokenizer that knows the domain better
TEXT=${TEXT:-$WORK/$NAME/data}                  # what prepare.sh wrote: domain, general, each with held-out text
GPUS=${GPUS:-8}                                 # of a node
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
export HF_HUB_OFFLINE=1

fail() { echo "$NAME: $*" >&2; exit 2; }
inject() { "$PYTHON" -m megatron_moe_inject.cli "$@"; }

need() { # FOLDER REMEDY
  [ -e "$1" ] || fail "$1 is not there; $2"
}

# One process for each GPU: of this machine, or of all nodes of a Slurm job.
launch() { # -m MODULE ARGUMENTS...
  if [ -n "${SLURM_JOB_ID:-}" ]; then
    srun --ntasks-per-node 1 "$PYTHON" -m torch.distributed.run --nnodes "$SLURM_NNODES" --nproc-per-node "$GPUS" \
      --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d \
      --rdzv-endpoint "$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1):29500" "$@"
  else
    "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "$GPUS" "$@"
  fi
}

# Megatron's flags of a run on the student: what it is (written by convert.sh), how it is laid out, how it trains.
flags() {
  need "$WORK/$NAME/student" "run convert.sh"
  need "$TEXT/domain.idx" "run prepare.sh"
  # shellcheck source=/dev/null
  source "$WORK/$NAME/student/flags.sh" # MODEL
  if [ -n "${LAYOUT_FLAGS:-}" ]; then read -ra LAYOUT <<<"$LAYOUT_FLAGS"; fi
  FLAGS=(
    "${MODEL[@]}" --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$HF" "${LAYOUT[@]}" "${TRAINING[@]}"
    --micro-batch-size 1 --lr-decay-style cosine --lr-warmup-fraction 0.05 --weight-decay 0.1 --adam-beta2 0.95
    --clip-grad 1.0 --attention-dropout 0 --hidden-dropout 0 --use-distributed-optimizer
    --moe-token-dispatcher-type alltoall --ckpt-format torch_dist --log-interval 10 --seed 1234
  )
  if [ -z "${CPU:-}" ]; then FLAGS+=("${DEVICE[@]}" --no-create-attention-mask-in-dataloader --manual-gc); fi
}

convert() {
  need "$HF" "download it: hf download $HUB --local-dir $HF"
  inject import-hf "$HF" --output "$WORK/$NAME/student" ${CPU:+--dtype fp32} "$@"
}

# Text in JSON lines, one document to a line, as token files; one document of a hundred is held out.
prepare() {
  need "$HF" "download it: hf download $HUB --local-dir $HF"
  local kind file
  for kind in domain general; do
    file=DOMAIN && [ "$kind" = domain ] || file=GENERAL
    need "${!file:-}" "name the $kind text (JSON lines) by $file=..."
    inject prepare-data --input "${!file}" --tokenizer "$HF" --output "$TEXT/$kind" --held-out 0.01 \
      ${EOD:+--eod-token "$EOD"} "$@"
  done
}

profile() {
  flags
  launch -m megatron_moe_inject.cli profile "$PWD/recipe.yaml" ${CPU:+--cpu} --output "$WORK/$NAME/profile.json" -- \
    "${FLAGS[@]}" --train-iters 1 --eval-interval 1 --eval-iters 64 \
    --train-data-path 0.5 "$TEXT/general" 0.5 "$TEXT/domain" --valid-data-path 0.5 "$TEXT/general" 0.5 "$TEXT/domain" \
    --load "$WORK/$NAME/student" --finetune --no-load-optim --no-load-rng "$@"
}

training() { # the flags of the injection
  flags
  FLAGS+=(
    --train-data-path "$TEXT/general" "$TEXT/domain" # no weights: the recipe's mixing says the shares
    --valid-data-path "$TEXT/general_held_out" "$TEXT/domain_held_out"
    --pretrained-checkpoint "$WORK/$NAME/student" --load "$WORK/$NAME/injected" --save "$WORK/$NAME/injected"
  )
  RECIPE=(--inject-set "teachers.teacher.source=hf:$TEACHER" "domains[0].experts.profile=$WORK/$NAME/profile.json")
}

# Experts of all layers that have some, as many on each expert-parallel rank, as text of a recipe.
evenly() {
  local layer expert ids="" all=""
  for expert in $(seq 0 $((EXPERTS / CHOSEN)) $((EXPERTS - 1))); do ids+=${ids:+,}$expert; done
  for layer in $MOE_LAYERS; do all+="${all:+;}$layer:$ids"; done
  echo "$all"
}

# Does it fit? What does a step take? Which ranks hold how much? Nothing is started.
plan() {
  training
  if [ ! -e "$WORK/$NAME/profile.json" ]; then
    echo "$NAME: planned with experts $(evenly | sed 's/;.*//; s/.*://') of each layer, as there is no profile yet" >&2
    RECIPE+=("domains[0].experts={layers: \"$(evenly)\"}")
  fi
  inject plan "$PWD/recipe.yaml" "${RECIPE[@]}" --gpus "$((GPUS * ${NODES:-1}))" --gpu-memory "${GPU_MEMORY:-80}" -- "${FLAGS[@]}" "$@"
}

train() {
  training
  need "$TEACHER" "name a dense model with the student's tokenizer by TEACHER=..."
  need "$WORK/$NAME/profile.json" "run profile.sh"
  launch -m megatron_moe_inject.pretrain ${CPU:+--cpu} "${FLAGS[@]}" --inject-recipe "$PWD/recipe.yaml" "${RECIPE[@]}" "$@"
}

export_hf() {
  need "$WORK/$NAME/injected" "run inject.sh"
  inject export-hf "$WORK/$NAME/injected" --hf "$HF" --output "$WORK/$NAME/hf" "$@"
}

"$@"
