# Nemotron-3-Nano-30B-A3B: a hybrid model of 52 layers: Mamba, attention, and 23 of 128 experts, of which each token uses 6; 31.6 B parameters.
NAME=nemotron3_nano
HUB=nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16
NODES=${NODES:-1}

# One node of eight GPUs of 80 GB: each holds 16 experts of every layer of experts.
LAYOUT=(--expert-model-parallel-size 8)
DEVICE=(--bf16 --transformer-impl transformer_engine --moe-grouped-gemm --overlap-grad-reduce --overlap-param-gather)
TRAINING=(--seq-length 4096 --global-batch-size 128 --train-iters 2000 --lr 5e-5 --min-lr 5e-6
  --save-interval 500 --eval-interval 500 --eval-iters 8)
