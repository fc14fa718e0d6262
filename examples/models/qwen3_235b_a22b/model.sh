# Qwen3-235B-A22B: 94 layers of 128 experts, of which each token uses 8; 235 B parameters.
# shellcheck disable=SC2034 # steps.sh reads them
NAME=qwen3_235b_a22b
HUB=Qwen/Qwen3-235B-A22B
NODES=${NODES:-4}
EOD='<|endoftext|>' # ends a document; the tokenizer's eos_token ends a turn of a chat
EXPERTS=128 CHOSEN=8 MOE_LAYERS="$(seq 0 93)" # of the model; of a layer, to plan with; that have experts

# Four nodes of eight GPUs of 80 GB: two stages of 47 layers, 8 experts of each layer on a GPU. Without recomputation the
# activations of the first stage take 56 GiB.
LAYOUT=(--pipeline-model-parallel-size 2 --expert-model-parallel-size 16
  --recompute-granularity full --recompute-method uniform --recompute-num-layers 1)
DEVICE=(--bf16 --transformer-impl transformer_engine --moe-grouped-gemm --overlap-grad-reduce --overlap-param-gather)
TRAINING=(--seq-length 4096 --global-batch-size 128 --train-iters 2000 --lr 3e-5 --min-lr 3e-6
  --save-interval 500 --eval-interval 500 --eval-iters 8)
