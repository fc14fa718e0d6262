# Qwen3-30B-A3B: 48 layers of 128 experts, of which each token uses 8; 30.5 B parameters.
# shellcheck disable=SC2034 # steps.sh reads them
NAME=qwen3_30b_a3b
HUB=Qwen/Qwen3-30B-A3B
NODES=${NODES:-1}
EOD='<|endoftext|>' # ends a document; the tokenizer's eos_token ends a turn of a chat
EXPERTS=128 CHOSEN=8 MOE_LAYERS="$(seq 0 47)" # of the model; of a layer, to plan with; that have experts

# One node of eight GPUs of 80 GB: each holds 16 experts of every layer.
LAYOUT=(--expert-model-parallel-size 8)
DEVICE=(--bf16 --transformer-impl transformer_engine --moe-grouped-gemm --overlap-grad-reduce --overlap-param-gather)
TRAINING=(--seq-length 4096 --global-batch-size 128 --train-iters 2000 --lr 5e-5 --min-lr 5e-6
  --save-interval 500 --eval-interval 500 --eval-iters 8)
