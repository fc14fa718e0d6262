"""What the forward pass of a teacher with experts costs against its dense part and dense models.

    python examples/benchmarks/moe_teacher_cost.py [--layers 4] [--experts 16] [--topk 2] [--ffn N]

CPU seconds of one thread on random weights, least of three passes of four sequences: the teacher,
of it the MoE layers, and dense models whose feed-forward is as wide as the experts that a token
passes, and as all of them. Experts run one by one, as without Transformer Engine; on a GPU they are
grouped.
"""

from __future__ import annotations

import argparse
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from megatron_moe_inject.host import cpu_lane  # noqa: E402

ROUNDS, SEQUENCES, LENGTH, VOCABULARY = 3, 4, 256, 1024


def arguments(args: Namespace, **changes: Any) -> Namespace:
    """What a checkpoint of such a model would store."""
    from megatron.training.arguments import add_megatron_arguments

    parser = add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    sizes = {
        "num_layers": args.layers,
        "hidden_size": args.hidden,
        "num_attention_heads": args.hidden // 64,
        "ffn_hidden_size": args.ffn,
        "max_position_embeddings": LENGTH,
        "position_embedding_type": "rope",
        "swiglu": True,
        "add_bias_linear": False,
        "normalization": "RMSNorm",
        "untie_embeddings_and_output_weights": True,
    }
    return Namespace(**vars(parser.parse_known_args([])[0]) | sizes | changes)


def seconds(saved: Namespace) -> tuple[float, float]:
    """CPU seconds of a pass, and of it those in the layers' feed-forwards."""
    from megatron_moe_inject.teachers.base import Source
    from megatron_moe_inject.teachers.megatron import MegatronTeacher
    from megatron_moe_inject.teachers.megatron_model import build

    source = Source("teacher", "megatron:/none", "megatron", Path("/none"))
    model = build(source, saved, VOCABULARY, torch.float32, on_gpu=False).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.02)
    teacher = MegatronTeacher("teacher", model, VOCABULARY)
    tokens = torch.randint(VOCABULARY, (SEQUENCES, LENGTH))
    found = []
    with _time_of([layer.mlp for layer in model.decoder.layers]) as inside:
        for _ in range(ROUNDS + 1):
            inside.clear()
            begin = time.process_time()
            teacher.states(tokens)
            found.append((time.process_time() - begin, sum(inside)))
    return min(found[1:])


@contextmanager
def _time_of(modules: list[torch.nn.Module]) -> Iterator[list[float]]:
    """Inside, the CPU seconds of each call of the modules."""
    spans: list[float] = []
    begun: list[float] = []

    def end(*_: Any) -> None:
        spans.append(time.process_time() - begun.pop())

    handles = []
    for module in modules:
        handles.append(
            module.register_forward_pre_hook(lambda *_: begun.append(time.process_time()))
        )
        handles.append(module.register_forward_hook(end))
    yield spans
    for handle in handles:
        handle.remove()


def main() -> None:
    """Print one table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, value in (("layers", 4), ("hidden", 512), ("ffn", 512), ("experts", 16), ("topk", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    torch.set_num_threads(1)
    cpu_lane.enable()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(7)
    torch.manual_seed(0)
    routed = {
        "num_experts": args.experts,
        "moe_router_topk": args.topk,
        "moe_ffn_hidden_size": args.ffn,
    }
    rows = {
        f"{args.topk} of {args.experts} experts of {args.ffn}": arguments(args, **routed),
        "dense, as wide as those": arguments(args, ffn_hidden_size=args.topk * args.ffn),
        "dense, as wide as all": arguments(args, ffn_hidden_size=args.experts * args.ffn),
    }
    print(f"{args.layers} layers, hidden {args.hidden}, {SEQUENCES} x {LENGTH} tokens, fp32")
    print("| teacher | seconds | of them feed-forwards | the rest |\n|---|---|---|---|")
    for name, saved in rows.items():
        whole, inside = seconds(saved)
        print(f"| {name} | {whole:.3f} | {inside:.3f} | {whole - inside:.3f} |")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
