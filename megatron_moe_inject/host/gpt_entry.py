"""What our own entry feeds Megatron's training loop: forward step, loss, model, start.

Behind ``pretrain.py``, which puts the plugin in before this module binds Megatron's names.
Shapes: b micro-batch, s sequence, c context-parallel size.
"""

import sys
from functools import partial
from typing import Any

import torch
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_decoder_layer_specs,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
from megatron.core.utils import StragglerDetector, get_attr_wrapped_model, get_model_config
from megatron.training import get_args, get_timers, inprocess_restart, pretrain
from megatron.training.argument_utils import pretrain_cfg_container_from_args
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args

from megatron_moe_inject.host import compat
from megatron_moe_inject.host.batches import datasets_provider, get_batch, packed_seq_params

SPIKE_FACTOR = 10
"""A loss this many times the largest so far is reported under ``--check-for-spiky-loss``."""

ROPE_SCALING_FACTOR = 8.0
"""The only one that Megatron's command line builds (``--use-rope-scaling``)."""

_REFUSED = {
    "fim_data": "fill-in-the-middle data",
    "logits_load_dir": "distillation from cached logits",
    "yaml_cfg": "YAML configuration",
}


def loss_func(loss_mask: torch.Tensor | None, output: torch.Tensor) -> tuple:
    """Sum of the masked token losses, number of tokens, and both for the log.

    ``output`` and ``loss_mask`` are ``[b, s]`` (``[b, s/c]`` under context parallelism). A NaN,
    an infinity or a spike goes to Megatron's rerun state machine, which tells a faulty device
    from a faulty run. No collective.
    """
    args = get_args()
    assert loss_mask is not None, "only stages without the output layer have no loss mask"
    mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * mask)
    num_tokens = mask.sum().clone().detach().to(torch.int)
    report = {"lm loss": torch.cat([loss.clone().detach().view(1), num_tokens.view(1)])}

    rerun = get_rerun_state_machine()
    validate = partial(rerun.validate_result, result=loss, tolerance=0.0)
    if args.check_for_nan_in_loss_and_grad:
        for name, test in (("NaN", torch.isnan), ("Inf", torch.isinf)):
            message = f"found {name} in local forward loss calculation"
            validate(rejection_func=test, message=message, fatal=True)
    if args.check_for_spiky_loss:
        spiky = partial(rerun.is_unexpectedly_large, threshold=SPIKE_FACTOR, context="loss")
        validate(rejection_func=spiky, message="Spiky loss", fatal=False)
    return loss, num_tokens, report


def forward_step(data_iterator: Any, model: Any, return_schedule_plan: bool = False) -> tuple:
    """One micro-batch through this rank's model chunk; the loss stays to be taken.

    With ``return_schedule_plan`` (``--overlap-moe-expert-parallel-comm``) the forward pass is
    handed back as a plan instead of being run.
    """
    args, timers, straggler = get_args(), get_timers(), StragglerDetector()
    timers("batch-generator", log_level=2).start()
    with straggler(bdata=True):
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        config = get_model_config(model)
        batch = get_batch(data_iterator, config, vp_stage, training=model.training)
    packing = packed_seq_params(batch, args.seq_length)
    timers("batch-generator").stop()

    inputs = (batch.tokens, batch.position_ids, batch.attention_mask)
    targets = {"labels": batch.labels, "loss_mask": batch.loss_mask}
    with straggler:
        if return_schedule_plan:
            output = model.build_schedule_plan(*inputs, **targets, packed_seq_params=packing)
        else:
            output = model(*inputs, **targets, packed_seq_params=packing)
    return output, partial(loss_func, batch.loss_mask)


def model_provider(
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
    layers: Any = None,
) -> GPTModel:
    """This rank's chunk of the GPT model, for Megatron versions without a builder of their own.

    Args:
        layers: their specification, where it is another than that of the arguments.
    """
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    spec_options = {
        "use_transformer_engine": args.transformer_impl == "transformer_engine",
        "normalization": args.normalization,
        "qk_l2_norm": args.qk_l2_norm,
        "vp_stage": vp_stage,
    }
    mtp_spec = None
    if args.mtp_num_layers is not None:
        last_layer = get_gpt_decoder_layer_specs(config, **spec_options)[-1]
        mtp_spec = get_gpt_mtp_block_spec(
            config,
            last_layer,
            use_transformer_engine=spec_options["use_transformer_engine"],
            vp_stage=vp_stage,
        )
    return GPTModel(
        config=config,
        transformer_layer_spec=layers or get_gpt_decoder_block_spec(config, **spec_options),
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        fp16_lm_cross_entropy=args.fp16_lm_cross_entropy,
        parallel_output=True,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        rope_scaling=args.use_rope_scaling,
        mtp_block_spec=mtp_spec,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )


def hybrid_model_provider(
    model_config: Any,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    config: Any = None,
    pg_collection: Any = None,
) -> HybridModel:
    """This rank's chunk of the hybrid model, for Megatron versions that build from no config.

    The builder of 0.18 refuses virtual stages, which its model has; NVIDIA's script does not use it
    either.

    Args:
        model_config: Megatron's ``HybridModelConfig``.
    """
    return HybridModel(
        config=config or model_config.transformer,
        hybrid_stack_spec=model_config.hybrid_stack_spec or hybrid_stack_spec,
        vocab_size=get_args().padded_vocab_size,
        max_sequence_length=model_config.seq_length,
        hybrid_layer_pattern=model_config.hybrid_layer_pattern,
        fp16_lm_cross_entropy=model_config.fp16_lm_cross_entropy,
        parallel_output=model_config.parallel_output,
        share_embeddings_and_output_weights=model_config.share_embeddings_and_output_weights,
        position_embedding_type=model_config.position_embedding_type,
        rotary_percent=model_config.rotary_percent,
        rotary_base=model_config.rotary_base,
        seq_len_interpolation_factor=model_config.seq_len_interpolation_factor,
        pre_process=pre_process,
        post_process=post_process,
        pg_collection=pg_collection,
        vp_stage=vp_stage,
    )


def embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """Ranks of a pipeline that hold the word embedding: first, last if tied, and MTP's."""
    ranks = {pp_ranks[0]}
    if len(pp_ranks) > 1:
        args = get_args()
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pp_ranks[-1])
        ranks.update(get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args)))
    return sorted(ranks)


def check_supported(args: Any) -> None:
    """Refuse what this entry leaves to NVIDIA's script.

    Raises:
        ValueError: names the flag and the way to run it.
    """
    for name, what in _REFUSED.items():
        if getattr(args, name, None):
            raise ValueError(
                f"--{name.replace('_', '-')}: megatron_moe_inject.pretrain has no {what}; run "
                "Megatron's own script through `python -m megatron_moe_inject.launch`"
            )
    if args.use_rope_scaling and args.rope_scaling_factor != ROPE_SCALING_FACTOR:
        raise ValueError(
            f"--rope-scaling-factor {args.rope_scaling_factor}: Megatron parses it and builds a "
            f"model with {ROPE_SCALING_FACTOR} all the same; such a model can be a teacher (hf:)"
        )
    if args.spec is not None and compat.model_config(args) is None:
        raise ValueError(
            f"--spec {' '.join(args.spec)}: needs Megatron-Core 0.19, and this is "
            f"{compat.megatron_version()}"
        )
    if args.sft and args.tokenizer_type != "SFTTokenizer":
        raise ValueError(
            f"--sft: conversations need a tokenizer with a chat template, and --tokenizer-type is "
            f"{args.tokenizer_type}; use SFTTokenizer with --tokenizer-model and "
            "--sft-tokenizer-prompt-format"
        )


def main() -> None:
    """Parse Megatron's flags and train."""
    training_loop, store = inprocess_restart.maybe_wrap_for_inprocess_restart(pretrain)
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    ours = (getattr(args, name, None) for name in ("inject_recipe", "inject_domain_data"))
    if any(value is not None for value in ours) and args.inject_progress is None:
        args.inject_progress = True
    try:
        check_supported(args)
    except ValueError as error:
        sys.exit(f"moe-inject: {error}")
    if args.sft:  # its samples have borders instead, as those of documents have
        args.create_attention_mask_in_dataloader = False
    model_config = compat.model_config(args)
    provider = {}
    if model_config is None:
        provider["model_provider"] = model_provider
    elif not compat.builds_from_config():
        provider["model_provider"] = partial(hybrid_model_provider, model_config)
    training_loop(
        pretrain_cfg_container_from_args(args, model_config),
        train_valid_test_dataset_provider=datasets_provider,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
        get_embedding_ranks=embedding_ranks,
        store=store,
        **provider,
    )
