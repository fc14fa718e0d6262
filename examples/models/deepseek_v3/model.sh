# DeepSeek-V3: 61 layers, the first three of them dense, of 256 experts and a shared one; each token uses 8; 671 B parameters.
# shellcheck disable=SC2034 # steps.sh reads them
NAME=deepseek_v3
HUB=deepseek-ai/DeepSeek-V3
NODES=${NODES:-8}
EXPERTS=256 CHOSEN=8 MOE_LAYERS="$(seq 3 60)" # of the model; of a layer, to plan with; that have experts

# Eight nodes of eight GPUs of 80 GB: eight stages of seven or eight layers, 32 experts of each layer on a GPU, prediction and
# loss in the last stage. Without recomputation the activations of the first stages take 65 GiB.
LAYOUT=(--pipeline-model-parallel-size 8 --pipeline-model-parallel-layout "Et*7|(t*8|)*6t*6mL"
  --expert-model-parallel-size 8 --recompute-granularity full --recompute-method uniform --recompute-num-layers 1)
DEVICE=(--bf16 --transformer-impl transformer_engine --moe-grouped-gemm --overlap-grad-reduce --overlap-param-gather)
TRAINING=(--seq-length 4096 --global-batch-size 128 --train-iters 2000 --lr 2e-5 --min-lr 2e-6
  --save-interval 500 --eval-interval 500 --eval-iters 8)
