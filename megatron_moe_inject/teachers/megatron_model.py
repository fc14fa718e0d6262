"""The model of a ``megatron:`` teacher, built from the arguments stored in its checkpoint.

It is Megatron's ``GPTModel`` with the teacher's own sizes, or its ``HybridModel`` with the layers
of the pattern as one pipeline stage, whole on this rank but for experts that lie on several. Its
other process groups are bare groups of one rank without a backend: they answer ``rank()`` and
``size()``, need nobody else to exist, and raise if anything tried to communicate through them. So
only the ranks that want a teacher build one, inside a job of any layout.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
from argparse import Namespace
from collections.abc import Iterator
from typing import Any

import torch

from megatron_moe_inject.host import cpu_lane
from megatron_moe_inject.host.cpu_lane.hybrid import WITHOUT, local_stack_spec
from megatron_moe_inject.host.layer_pattern import LayerPattern, pattern_of
from megatron_moe_inject.host.megatron_types import Chunk, Config, Groups
from megatron_moe_inject.host.wrap import Call, wrap_function
from megatron_moe_inject.teachers import megatron_args
from megatron_moe_inject.teachers.base import Source
from megatron_moe_inject.teachers.uses import STATE_TENSORS

_ATTENTION_SWITCHES = ("NVTE_FLASH_ATTN", "NVTE_FUSED_ATTN", "NVTE_UNFUSED_ATTN")


def build(
    source: Source,
    saved: Namespace,
    rows: int,
    params_dtype: torch.dtype,
    on_gpu: bool,
    experts: torch.distributed.ProcessGroup | None = None,
) -> Chunk:
    """The saved model with ``rows`` rows of vocabulary, its values not yet those of the checkpoint.

    Args:
        saved: arguments stored in the checkpoint.
        params_dtype: type of parameters and activations.
        on_gpu: with Transformer Engine where it is there.
        experts: the ranks that hold its experts together; None holds all here.

    Raises:
        RecipeError: the installed packages cannot build it.
    """
    from megatron.core import parallel_state
    from megatron.core.models.gpt import gpt_layer_specs
    from megatron.training.argument_utils import core_transformer_config_from_args

    assert parallel_state.model_parallel_is_initialized(), "Megatron must be initialized first"
    use_te = on_gpu and gpt_layer_specs.HAVE_TE
    if getattr(saved, "multi_latent_attention", False) and not (use_te or cpu_lane.is_enabled()):
        raise source.error(
            "uses multi-latent attention, which Megatron builds with Transformer Engine only",
            "install Transformer Engine and run on a GPU, or use another teacher",
        )
    args = megatron_args.teacher_arguments(
        saved,
        params_dtype=params_dtype,
        on_gpu=on_gpu,
        use_te=use_te,
        ep=1 if experts is None else experts.size(),
    )
    pattern = pattern_of(args)
    if pattern is not None and not use_te:
        _check_local_stack(source, pattern)
    try:
        config = core_transformer_config_from_args(args)
        whole: dict[str, Any] = {
            "config": config,
            "vocab_size": rows,
            "max_sequence_length": args.max_position_embeddings,
            "share_embeddings_and_output_weights": not args.untie_embeddings_and_output_weights,
            "position_embedding_type": args.position_embedding_type,
            "rotary_percent": args.rotary_percent,
            "rotary_base": args.rotary_base,
            "seq_len_interpolation_factor": args.rotary_seq_len_interpolation_factor,
            "pg_collection": _groups_of_one(experts),
        }
        with _own_attention_switches():
            if pattern is None:
                return _gpt(whole, use_te, args.use_rope_scaling)
            return _hybrid(whole, use_te, pattern)
    except (AssertionError, AttributeError, ImportError, TypeError, ValueError) as error:
        raise source.error(
            f"cannot be built by the installed Megatron: {error}",
            "use the Megatron version and the layers (Transformer Engine) it was trained with",
        ) from error


def _gpt(whole: dict[str, Any], use_te: bool, rope_scaling: bool) -> Chunk:
    from megatron.core.models.gpt.gpt_model import GPTModel

    spec = _layer_spec(whole["config"], use_te)
    return GPTModel(**whole, transformer_layer_spec=spec, rope_scaling=rope_scaling)


def _hybrid(whole: dict[str, Any], use_te: bool, pattern: LayerPattern) -> Chunk:
    from megatron.core.models.hybrid.hybrid_model import HybridModel

    if use_te:
        from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec as spec
    else:
        spec = local_stack_spec()
    # Megatron asks torch for the rank in this one, which knows no bare group; None is one stage.
    whole["pg_collection"].pp = None
    model = HybridModel(**whole, hybrid_stack_spec=spec, hybrid_layer_pattern=pattern.symbols)
    # So that its forward pass ends with the states behind the last norm.
    model.post_process = False
    return model


def sharded_state_dict(model: Chunk, metadata: dict[str, Any]) -> dict[str, Any]:
    """The model's sharded state with its tensors whole.

    Megatron before 0.19 asks the job, and not the model, for the tensor-parallel group of a Mamba
    layer's parameters.
    """
    wrap = wrap_function(STATE_TENSORS, _of_one_rank)
    try:
        return model.sharded_state_dict(metadata={**metadata, "dp_cp_group": alone()})
    finally:
        wrap.remove()


def _of_one_rank(call: Call) -> dict[str, Any]:
    return call(tp_group=alone(), dp_cp_group=alone())


def _check_local_stack(source: Source, pattern: LayerPattern) -> None:
    """Megatron's own stack names Transformer Engine's layers; the CPU lane has a local one."""
    lane = cpu_lane.is_enabled()
    missing = sorted(set(pattern.symbols) & set(WITHOUT)) if lane else ["its"]
    if missing:
        raise source.error(
            f"is a hybrid model ({pattern.symbols}), and {', '.join(missing)} layers need "
            "Transformer Engine",
            "install Transformer Engine and run on a GPU, or use another teacher",
        )


def _layer_spec(config: Config, use_te: bool) -> Any:
    from megatron.core.models.gpt import gpt_layer_specs

    if config.num_moe_experts:
        return gpt_layer_specs.get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=use_te,
            normalization=config.normalization,
            qk_l2_norm=config.qk_l2_norm,
            pp_rank=0,
        )
    options: dict[str, Any] = {
        "qk_layernorm": config.qk_layernorm,
        "qk_l2_norm": config.qk_l2_norm,
        "multi_latent_attention": config.multi_latent_attention,
    }
    if not use_te:
        options["normalization"] = config.normalization
        return gpt_layer_specs.get_gpt_layer_local_spec(**options)
    if getattr(config, "mla_down_proj_fusion", False):
        options["mla_down_proj_fusion"] = True
    return gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(**options)


def _groups_of_one(experts: torch.distributed.ProcessGroup | None) -> Groups:
    """Every process group of Megatron's as a bare group that holds this rank alone, but for those
    of ``experts``.

    ``torch.distributed.new_group`` would advance the counter that names later groups on the
    calling ranks only, and those later groups would then never meet.
    """
    from megatron.core.process_groups_config import ProcessGroupCollection

    one_rank = alone()
    groups = ProcessGroupCollection(
        **{field.name: one_rank for field in dataclasses.fields(ProcessGroupCollection)}
    )
    groups.hcp = [one_rank]
    groups.embd = groups.pos_embd = None
    if experts is not None:
        groups.ep = groups.tp_ep = experts
    return groups


def alone() -> torch.distributed.ProcessGroup:
    """A group of this rank without a backend."""
    return torch.distributed.ProcessGroup(0, 1)  # type: ignore[call-arg]  # not in torch's stub


@contextlib.contextmanager
def _own_attention_switches() -> Iterator[None]:
    """Megatron pins the attention backend in the environment when a model is built; put it back.

    At run time the teacher then uses the backends that the student's pins allow.
    """
    before = {name: os.environ.pop(name, None) for name in _ATTENTION_SWITCHES}
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
