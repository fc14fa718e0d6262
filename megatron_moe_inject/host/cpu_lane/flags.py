"""Megatron flags on the CPU lane: defaults that need no GPU, and a clear refusal of the rest.

Only what cannot run is changed, so that a run differs from a GPU run in nothing else. A flag
given on the command line wins over the lane's default and is then checked.
"""

import argparse
import sys
from typing import Any

from megatron_moe_inject.host.cpu_lane import hybrid
from megatron_moe_inject.host.lane_uses import LANE_ARGUMENTS, LANE_VALIDATION
from megatron_moe_inject.host.wrap import Call, wrap_function

DEFAULTS = {
    "distributed_backend": "gloo",
    "transformer_impl": "local",
    "gradient_accumulation_fusion": False,
    "no_persist_layer_norm": True,
    "masked_softmax_fusion": False,
    "apply_rope_fusion": False,
}

_LACKING = (
    lambda v: bool(set(v or "") & set(hybrid.WITHOUT)),
    "sparse attention (D) needs Transformer Engine, a gated delta net (G) needs fla; "
    "use layers of *, +, E, - and M",
)

# argument name -> (what is refused, how to do without)
_REFUSED = {
    "distributed_backend": (lambda v: v != "gloo", "use --distributed-backend gloo"),
    "transformer_impl": (lambda v: v != "local", "use --transformer-impl local"),
    "moe_grouped_gemm": (bool, "grouped GEMM needs Transformer Engine; leave the flag out"),
    "fp8": (bool, "FP8 needs a GPU; leave the flag out"),
    "fp4": (bool, "FP4 needs a GPU; leave the flag out"),
    "tp_comm_overlap": (bool, "needs Transformer Engine; leave the flag out"),
    "use_torch_fsdp2": (bool, "not supported on this lane; leave the flag out"),
    "use_megatron_fsdp": (bool, "not supported on this lane; leave the flag out"),
    "optimizer_cpu_offload": (bool, "everything is on the CPU already; leave the flag out"),
    "moe_token_dispatcher_type": (
        lambda v: v == "flex",
        "use --moe-token-dispatcher-type alltoall or allgather",
    ),
    "cuda_graph_impl": (lambda v: v not in (None, "none"), "leave the flag out"),
    "hybrid_layer_pattern": _LACKING,
    "hybrid_override_pattern": _LACKING,
    "mamba_training_ssm_states_dtype": (
        bool,
        "the lane's Mamba layers keep their states in fp32; leave the flag out",
    ),
}

_FLAG_NAMES = {"fp8": "--fp8-format", "fp4": "--fp4-format"}

_PACKED = ("dataloader_inter_document_masking", "sft")
_REFUSED_UNDER_CONTEXT_PARALLELISM = ("window_size", *_PACKED)


class CpuLaneFlagError(ValueError):
    """A flag that needs a GPU or Transformer Engine."""


def _flag(name: str) -> str:
    return _FLAG_NAMES.get(name, "--" + name.replace("_", "-"))


def check(args: argparse.Namespace) -> None:
    """Refuse flags that this lane cannot honour.

    Raises:
        CpuLaneFlagError: names every such flag, its value and the remedy.
    """
    mistakes = [
        f"{_flag(name)} (is {getattr(args, name)!r}): {remedy}"
        for name, (refused, remedy) in _REFUSED.items()
        if hasattr(args, name) and refused(getattr(args, name))
    ]
    if getattr(args, "context_parallel_size", 1) > 1:
        mistakes += [
            f"{_flag(name)} with --context-parallel-size "
            f"{args.context_parallel_size}: leave one of them out"
            for name in _REFUSED_UNDER_CONTEXT_PARALLELISM
            if getattr(args, name, None)
        ]
    pattern = getattr(args, "hybrid_layer_pattern", None) or ""
    local = args.transformer_impl == "local"
    if local and "+" in pattern and not (args.qk_layernorm and args.q_lora_rank):
        mistakes.append(
            f"--hybrid-layer-pattern (is {pattern!r}): the lane has + layers with norms of both "
            "latents; add --qk-layernorm and --q-lora-rank"
        )
    if getattr(args, "window_size", None):
        mistakes += [
            f"{_flag(name)} with --window-size, whose mask hides no other document in Megatron's "
            "local attention: leave one of them out"
            for name in _PACKED
            if getattr(args, name, None)
        ]
    if mistakes:
        raise CpuLaneFlagError("not on the CPU lane: " + "; ".join(mistakes))


def install() -> None:
    """Put the defaults under Megatron's parser and the check before its validation."""
    wrap_function(LANE_ARGUMENTS, _with_defaults)
    wrap_function(LANE_VALIDATION, _checked)


def _with_defaults(call: Call) -> argparse.ArgumentParser:
    parser = call()
    known = {action.dest for action in parser._actions}
    parser.set_defaults(**{k: v for k, v in DEFAULTS.items() if k in known})
    return parser


def _checked(call: Call) -> Any:
    try:
        check(call["args"])
    except CpuLaneFlagError as error:
        sys.exit(f"moe-inject: {error}")
    return call()
