# Nemotron-3-Nano-30B-A3B: a hybrid model of 52 layers: Mamba, attention, and 23 of 128 experts, of which each token uses 6; 31.6 B parameters.
# shellcheck disable=SC2034 # steps.sh reads them
NAME=nemotron3_nano
HUB=nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16
NODES=${NODES:-1}
EXPERTS=128 CHOSEN=8 MOE_LAYERS="1 3 6 8 10 13 15 17 20 22 24 27 29 31 34 36 38 40 43 45 47 49 51" # of the model; of a layer, to plan with; that have experts

# One node of eight GPUs of 80 GB: each holds 16 experts of every layer of experts.
LAYOUT=(--expert-model-parallel-size 8)
DEVICE=(--bf16 --transformer-impl transformer_engine --moe-grouped-gemm --overlap-grad-reduce --overlap-param-gather)
TRAINING=(--seq-length 4096 --global-batch-size 128 --train-iters 2000 --lr 5e-5 --min-lr 5e-6
  --save-interval 500 --eval-interval 500 --eval-iters 8)
