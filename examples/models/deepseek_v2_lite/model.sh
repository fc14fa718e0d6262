# DeepSeek-V2-Lite: 27 layers, the first of them dense, of 64 experts and two shared ones; each token uses 6; 15.7 B parameters.
# shellcheck disable=SC2034 # steps.sh reads them
NAME=deepseek_v2_lite
HUB=deepseek-ai/DeepSeek-V2-Lite
NODES=${NODES:-1}
EXPERTS=64 CHOSEN=8 MOE_LAYERS="$(seq 1 26)" # of the model; of a layer, to plan with; that have experts

# One node of eight GPUs of 80 GB: each holds 8 experts of every layer.
LAYOUT=(--expert-model-parallel-size 8)
DEVICE=(--bf16 --transformer-impl transformer_engine --moe-grouped-gemm --overlap-grad-reduce --overlap-param-gather)
TRAINING=(--seq-length 4096 --global-batch-size 128 --train-iters 2000 --lr 5e-5 --min-lr 5e-6
  --save-interval 500 --eval-interval 500 --eval-iters 8)
