# DeepSeek-V3: 61 layers, the first three of them dense, of 256 experts and a shared one; each token uses 8; 671 B parameters.
NAME=deepseek_v3
HUB=deepseek-ai/DeepSeek-V3
NODES=${NODES:-16}

# 
LAYOUT=()
DEVICE=(--bf16 --transformer-impl transformer_engine --moe-grouped-gemm --overlap-grad-reduce --overlap-param-gather)
TRAINING=(--seq-length 4096 --global-batch-size 128 --train-iters 2000 --lr 2e-5 --min-lr 2e-6
  --save-interval 500 --eval-interval 500 --eval-iters 8)
