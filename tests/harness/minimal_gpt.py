"""A training script as sites have them: knows Megatron, knows nothing of the plugin.

It has the interface of NVIDIA's ``pretrain_gpt.py`` (binds Megatron's names at import, parses
through ``parse_and_validate_args``, tensor-parallel rank 0 of the end stages reads the data) and
only its plain path: GPT, mock or indexed data, no packing, no fine-tuning. With
``--hybrid-layer-pattern`` it is a ``pretrain_hybrid.py``.
"""

import inspect
import sys
from functools import partial

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.utils import get_batch_on_this_cp_rank, get_batch_on_this_tp_rank
from megatron.training import argument_utils, get_args, get_timers, pretrain
from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args
from megatron.training.utils import get_blend_and_blend_per_split

KEYS = ("tokens", "labels", "loss_mask", "position_ids", "attention_mask")
UNUSED = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen", "local_cp_size", "hybrid_cp_group")


def get_batch(data_iterator):
    args = get_args()
    if not (mpu.is_pipeline_first_stage() or mpu.is_pipeline_last_stage()):
        return dict.fromkeys(KEYS)
    batch = {}
    if mpu.get_tensor_model_parallel_rank() == 0:
        sample = next(data_iterator)
        batch = {key: sample[key].cuda() for key in KEYS} | dict.fromkeys(UNUSED)
    parameters = inspect.signature(get_batch_on_this_tp_rank).parameters
    packed = "has_cu_seqlens" if "has_cu_seqlens" in parameters else "is_sft"
    batch = get_batch_on_this_tp_rank(
        batch,
        is_hybrid_cp=False,
        create_attention_mask_in_dataloader=True,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=mpu.get_tensor_model_parallel_rank(),
        micro_batch_size=args.micro_batch_size,
        seq_length=args.seq_length,
        mtp_on_this_rank=args.mtp_num_layers is not None and mpu.is_pipeline_last_stage(),
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
        **{packed: False},
    )
    return get_batch_on_this_cp_rank(
        batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
    )


def loss_func(loss_mask, output):
    loss_mask = loss_mask.view(-1).float()
    loss = torch.sum(output.view(-1).float() * loss_mask)
    tokens = loss_mask.sum().clone().detach().to(torch.int)
    return loss, tokens, {"lm loss": torch.cat([loss.clone().detach().view(1), tokens.view(1)])}


def forward_step(data_iterator, model):
    get_timers()("batch-generator", log_level=2).start()
    batch = get_batch(data_iterator)
    get_timers()("batch-generator").stop()
    output = model(
        batch["tokens"],
        batch["position_ids"],
        batch["attention_mask"],
        labels=batch["labels"],
        loss_mask=batch["loss_mask"],
    )
    return output, partial(loss_func, batch["loss_mask"])


def datasets_provider(num_samples, vp_stage=None):
    args = get_args()
    blend, blend_per_split = get_blend_and_blend_per_split(args)
    config = GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split=args.split,
        path_to_cache=args.data_cache_path,
        tokenizer=build_tokenizer(args),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=True,
    )
    kind = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(
        kind, num_samples, lambda: mpu.get_tensor_model_parallel_rank() == 0, config
    ).build()


datasets_provider.is_distributed = True


def model_provider(pre_process=True, post_process=True, vp_stage=None, config=None, **groups):
    args = get_args()
    config = config or core_transformer_config_from_args(args)
    if args.hybrid_layer_pattern is None:
        layers = get_gpt_decoder_block_spec(
            config,
            use_transformer_engine=args.transformer_impl == "transformer_engine",
            normalization=args.normalization,
            vp_stage=vp_stage,
        )
        build = partial(GPTModel, transformer_layer_spec=layers)
    else:
        build = partial(
            HybridModel,
            hybrid_stack_spec=hybrid_stack_spec,
            hybrid_layer_pattern=args.hybrid_layer_pattern,
        )
    return build(
        config=config,
        vocab_size=args.padded_vocab_size,
        max_sequence_length=args.max_position_embeddings,
        pre_process=pre_process,
        post_process=post_process,
        share_embeddings_and_output_weights=not args.untie_embeddings_and_output_weights,
        position_embedding_type=args.position_embedding_type,
        rotary_percent=args.rotary_percent,
        rotary_base=args.rotary_base,
        vp_stage=vp_stage,
        **groups,
    )


if __name__ == "__main__":
    print(f"minimal_gpt: {sys.argv[0]} {len(sys.argv) - 1}")
    args = parse_and_validate_args(args_defaults={"tokenizer_type": "GPT2BPETokenizer"})
    model, provider = None, {"model_provider": model_provider}
    if hasattr(argument_utils, "gpt_config_from_args"):
        kind = "gpt" if args.hybrid_layer_pattern is None else "hybrid"
        model, provider = getattr(argument_utils, f"{kind}_config_from_args")(args), {}
    pretrain(
        argument_utils.pretrain_cfg_container_from_args(args, model),
        train_valid_test_dataset_provider=datasets_provider,
        model_type=ModelType.encoder_or_decoder,
        forward_step_func=forward_step,
        **provider,
    )
