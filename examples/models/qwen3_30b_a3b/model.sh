# Qwen3-30B-A3B: 48 layers of 128 experts, of which each token uses 8; 30.5 B parameters.
NAME=qwen3_30b_a3b
HUB=Qwen/Qwen3-30B-A3B
NODES=${NODES:-1}

# One node of eight GPUs of 80 GB: each holds 16 experts of every layer.
LAYOUT=(--expert-model-parallel-size 8)
DEVICE=(--bf16 --transformer-impl transformer_engine --moe-grouped-gemm --overlap-grad-reduce --overlap-param-gather)
TRAINING=(--seq-length 4096 --global-batch-size 128 --train-iters 2000 --lr 5e-5 --min-lr 5e-6
  --save-interval 500 --eval-interval 500 --eval-iters 8)
