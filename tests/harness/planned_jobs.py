"""Flags of published models, and one planning process for a test session.

Sizes are those of the models' configurations; experts are named by hand.
"""

from __future__ import annotations

import atexit
import functools
import runpy
import shlex
from pathlib import Path

from megatron_moe_inject.planning.client import Planner

BENCHMARKS = Path(__file__).resolve().parents[2] / "examples" / "benchmarks"

_BENCH = runpy.run_path(str(BENCHMARKS / "plan_bench.py"))
_COMMON, DEEPSEEK_V3 = _BENCH["COMMON"], _BENCH["DEEPSEEK_V3"]
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


@functools.cache
def session_planner() -> Planner:
    """The process that plans, started at the first plan of a test session."""
    planner = Planner()
    atexit.register(planner.close)
    return planner
