# OLMoE-1B-7B: 16 layers of 64 experts, of which each token uses 8; 6.9 B parameters.
# shellcheck disable=SC2034 # steps.sh reads them
NAME=olmoe
HUB=allenai/OLMoE-1B-7B-0924
NODES=${NODES:-1}
EXPERTS=64 CHOSEN=8 MOE_LAYERS="$(seq 0 15)" # of the model; of a layer, to plan with; that have experts

# One node of eight GPUs of 80 GB: each holds 8 experts of every layer.
LAYOUT=(--expert-model-parallel-size 8)
DEVICE=(--bf16 --transformer-impl transformer_engine --moe-grouped-gemm --overlap-grad-reduce --overlap-param-gather)
TRAINING=(--seq-length 4096 --global-batch-size 128 --train-iters 2000 --lr 5e-5 --min-lr 5e-6
  --save-interval 500 --eval-interval 500 --eval-iters 8)
