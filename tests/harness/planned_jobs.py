"""Flags of published models, and one planning process for a test session.

Sizes are those of the models' configurations; experts are named by hand.
"""

from __future__ import annotations

import atexit
import functools
import shlex

from megatron_moe_inject.planning.client import Planner

_COMMON = (
    "--normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --tokenizer-type NullTokenizer "
    "--make-vocab-size-divisible-by 1 --seq-length 4096 --max-position-embeddings 4096 "
    "--micro-batch-size 1 --train-iters 10 --lr 1e-5 --bf16 --transformer-impl transformer_engine "
    "--moe-grouped-gemm --moe-token-dispatcher-type alltoall --attention-dropout 0 "
    "--hidden-dropout 0 --use-distributed-optimizer --mock-data "
)
_QWEN3 = (
    "--group-query-attention --num-query-groups 4 --kv-channels 128 --num-experts 128 "
    "--moe-router-topk 8 --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.001 "
    "--qk-layernorm --vocab-size 151936 "
)
QWEN3_30B = shlex.split(
    f"{_COMMON} {_QWEN3} --num-layers 48 --hidden-size 2048 --num-attention-heads 32 "
    "--ffn-hidden-size 6144 --moe-ffn-hidden-size 768 --global-batch-size 64"
)
QWEN3_235B = shlex.split(
    f"{_COMMON} {_QWEN3} --num-layers 94 --hidden-size 4096 --num-attention-heads 64 "
    "--ffn-hidden-size 12288 --moe-ffn-hidden-size 1536 --global-batch-size 256"
)
DEEPSEEK_V3 = shlex.split(
    f"{_COMMON} --num-layers 61 --hidden-size 7168 --num-attention-heads 128 --kv-channels 128 "
    "--multi-latent-attention --q-lora-rank 1536 --kv-lora-rank 512 --qk-head-dim 128 "
    "--qk-pos-emb-head-dim 64 --v-head-dim 128 --ffn-hidden-size 18432 --num-experts 256 "
    "--moe-layer-freq [0]*3+[1]*58 --moe-ffn-hidden-size 2048 "
    "--moe-shared-expert-intermediate-size 2048 --moe-router-topk 8 --moe-router-num-groups 8 "
    "--moe-router-group-topk 4 --moe-router-score-function sigmoid "
    "--moe-router-topk-scaling-factor 2.5 --moe-router-enable-expert-bias --moe-router-dtype fp32 "
    "--moe-router-load-balancing-type seq_aux_loss --moe-aux-loss-coeff 0.0001 --qk-layernorm "
    "--vocab-size 129280 --global-batch-size 8192 --mtp-num-layers 1 "
    "--pipeline-model-parallel-size 16 --pipeline-model-parallel-layout Et*3|(tt|)*29m|L "
    "--expert-tensor-parallel-size 1"
)


@functools.cache
def session_planner() -> Planner:
    """The process that plans, started at the first plan of a test session."""
    planner = Planner()
    atexit.register(planner.close)
    return planner
