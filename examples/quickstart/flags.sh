# Megatron flags of the quickstart, by what they describe. Sourced by quickstart.sh and pretrain_models.sh.

HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

# The student: 2.1M parameters in a mixture of 8 small experts, of which each token uses 2.
STUDENT=(
  --num-layers 4 --hidden-size 128 --num-attention-heads 4
  --num-experts 8 --moe-router-topk 2 --ffn-hidden-size 128 --moe-ffn-hidden-size 128
  --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01
  --moe-router-dtype fp32 --moe-token-dispatcher-type alltoall
)

# The teacher: 1.5M parameters, dense, and of another width than the student.
TEACHER=(--num-layers 4 --hidden-size 160 --num-attention-heads 5 --ffn-hidden-size 400)

# What both have in common: a Llama-like block and one tokenizer.
BOTH=(
  --seq-length 256 --max-position-embeddings 256
  --normalization RMSNorm --swiglu --disable-bias-linear
  --position-embedding-type rope --attention-dropout 0 --hidden-dropout 0
  --tokenizer-type HuggingFaceTokenizer --tokenizer-model "$HERE/tokenizer"
  --make-vocab-size-divisible-by 128
)

# Optimizer, batch of 16 x 256 = 4,096 tokens, logging.
TRAINING=(
  --micro-batch-size 8 --global-batch-size 16
  --optimizer adam --adam-beta2 0.95 --weight-decay 0.1 --clip-grad 1.0
  --lr-decay-style cosine --lr-warmup-fraction 0.06
  --num-workers 0 --ckpt-format torch_dist --log-interval 10 --seed 1234
)

# Held-out text of both kinds, whole, each with a loss of its own.
HELD_OUT=(--full-validation --multiple-validation-sets --validation-set-names code english)

# Runs Megatron on gloo processes of this machine, two unless PROCESSES says otherwise.
megatron() { # FLAGS...
  "$PYTHON" -m torch.distributed.run --standalone --nproc-per-node "${PROCESSES:-2}" \
    -m megatron_moe_inject.pretrain --cpu "$@"
}
