"""The planner: how far plans are from measured memory, and how many ranks it plans in a second.

    python examples/benchmarks/plan_bench.py [--gpus 256 1024 4096] [--results FILE ...]

The first table plans every arm of measured results (``gpu/step_bench.py --json``). The second plans
every rank of DeepSeek-V3 with 9 chosen experts, its states and one micro-batch through each kind of
stage, at PP 16 x VPP 2; seconds are those of the plan, after the process has imported Megatron.
"""

from __future__ import annotations

import argparse
import resource
import shlex
import time
from pathlib import Path

from megatron_moe_inject.planning.calibrate import measured_arms, read_results
from megatron_moe_inject.planning.client import Planner, planner

GIB = 2**30
RESULTS = Path(__file__).parent / "results" / "2026-11-26-step-h100-third.json"
COMMON = (
    "--normalization RMSNorm --swiglu --disable-bias-linear --position-embedding-type rope "
    "--untie-embeddings-and-output-weights --tokenizer-type NullTokenizer "
    "--make-vocab-size-divisible-by 1 --seq-length 4096 --max-position-embeddings 4096 "
    "--micro-batch-size 1 --train-iters 10 --lr 1e-5 --bf16 --transformer-impl transformer_engine "
    "--moe-grouped-gemm --moe-token-dispatcher-type alltoall --attention-dropout 0 "
    "--hidden-dropout 0 --use-distributed-optimizer --mock-data "
)
DEEPSEEK_V3 = shlex.split(
    f"{COMMON} --num-layers 61 --hidden-size 7168 --num-attention-heads 128 --kv-channels 128 "
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
"""Megatron's flags of DeepSeek-V3, with its multi-token prediction."""
CHOSEN = """
domains:
  - {name: code, data: [0], experts: {layers: {30: [0, 1, 2, 3, 4, 100], 45: [40], 60: [3, 127]}}}
objective: {alpha: 0, beta: 1}
"""


def error_table(process: Planner, path: Path) -> list[str]:
    """Every arm of a results file: planned and measured."""
    lines = [
        path.name,
        "| precision | arm | planned GiB | measured GiB | off | TFLOP/s |",
        "|---|---|---|---|---|---|",
    ]
    for arm in measured_arms(process, read_results(str(path))):
        planned, measured = (size / GIB for size in (arm.planned_bytes, arm.measured_bytes))
        lines.append(
            f"| {arm.precision} | {arm.arm} | {planned:.2f} | {measured:.2f} | {arm.off:+.1%} | "
            f"{arm.tflops:.0f} |"
        )
    return lines


def speed_table(process: Planner, sizes: list[int]) -> list[str]:
    """DeepSeek-V3, every rank, by number of ranks."""
    lines = [
        "| ranks | EP | seconds | ranks a second | parameters | fullest rank GiB | emptiest GiB |",
        "|---|---|---|---|---|---|---|",
    ]
    for gpus in sizes:
        ep = min(64, gpus // 16)
        flags = [*DEEPSEEK_V3, "--expert-model-parallel-size", str(ep)]
        begun = time.perf_counter()
        plan = process.plan(CHOSEN, flags, gpus).plan
        seconds = time.perf_counter() - begun
        peaks = [rank.peak / GIB for rank in plan.ranks]
        assert len(peaks) == gpus
        lines.append(
            f"| {gpus:,} | {ep} | {seconds:.1f} | {gpus / seconds:,.0f} | "
            f"{sum(plan.parameters.values()):,} | {max(peaks):.2f} | {min(peaks):.2f} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--gpus", type=int, nargs="*", default=[256, 1024, 4096])
    parser.add_argument("--results", type=Path, nargs="*", default=[RESULTS])
    options = parser.parse_args()
    with planner() as process:
        for path in options.results:
            print("\n".join(error_table(process, path)), flush=True)
        print("\n".join(speed_table(process, options.gpus)), flush=True)
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**10
    print(f"the planning process reached {peak:,.0f} MiB")


if __name__ == "__main__":
    main()
