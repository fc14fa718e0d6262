"""Datasets and micro-batches of our own GPT entry.

The stock pieces do the work: ``GPTDataset``, or with ``--sft`` ``SFTDataset``, under Megatron's
blend, one broadcast per tensor from tensor-parallel rank 0, and context-parallel slicing. Only the
keys that those pieces know pass (a blend adds ``dataset_id``, which stock slicing cannot take).
Shapes: b micro-batch, s sequence, c context-parallel size; tokens ``[b, s]``, after slicing
``[b, s/c]``.
"""

from __future__ import annotations

import json
from functools import partial
from typing import Any, NamedTuple

import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.parallel_state import get_hybrid_data_context_parallel_groups
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank
from megatron.training import get_args, print_rank_0
from megatron.training.arguments import core_transformer_config_from_args
from megatron.training.datasets.sft_dataset import SFTDataset
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_moe_inject.host import compat


class Batch(NamedTuple):
    """One micro-batch on this rank; ``None`` for what this pipeline stage does not need."""

    tokens: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    loss_mask: torch.Tensor | None = None
    cu_seqlens: torch.Tensor | None = None
    cu_seqlens_padded: torch.Tensor | None = None
    max_seqlen: torch.Tensor | None = None
    local_cp_size: torch.Tensor | None = None
    hybrid_cp_group: torch.distributed.ProcessGroup | None = None


def is_packed(args: Any) -> bool:
    """Whether the data loader packs documents and sends ``cu_seqlens``."""
    return bool(args.sft or _masks_documents(args))


def _masks_documents(args: Any) -> bool:
    """Whether pretraining documents are packed, whose lengths no context-parallel size divides."""
    return bool(getattr(args, "dataloader_inter_document_masking", False))


def has_mtp(config: Any, vp_stage: int | None) -> bool:
    """Whether this pipeline stage runs multi-token-prediction layers."""
    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def get_batch(
    data_iterator: Any, config: Any, vp_stage: int | None = None, *, training: bool = True
) -> Batch:
    """Next micro-batch, broadcast over tensor parallelism and sliced over context parallelism.

    Every rank of a tensor-parallel group calls it; rank 0 of the group reads the iterator.
    Middle pipeline stages get an empty batch, or the packing metadata when documents are packed.

    Args:
        training: the model is in training mode, so that the micro-batch is one of training.

    Collectives: those of Megatron's broadcast over the tensor-parallel group, and of
    ``_micro_batch_size``.
    """
    args = get_args()
    packed = is_packed(args)
    mtp = has_mtp(config, vp_stage)
    at_an_end = is_first_or_last_pipeline_stage(vp_stage) or mtp
    if not at_an_end and not packed:
        return Batch()

    tp_rank = mpu.get_tensor_model_parallel_rank()
    batch = {}
    if tp_rank == 0:
        sample = next(data_iterator)
        for key in Batch._fields:
            value = sample.get(key)
            batch[key] = None if value is None else value.cuda(non_blocking=True)
    size = args.micro_batch_size
    if not training:
        size = _micro_batch_size(args, batch)
    batch = compat.batch_on_this_tp_rank(
        batch,
        packed=packed,
        is_hybrid_cp=args.hybrid_context_parallel,
        create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
        broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
        broadcast_group=mpu.get_tensor_model_parallel_group(),
        cp_size=args.context_parallel_size,
        tp_rank=tp_rank,
        micro_batch_size=size,
        seq_length=args.seq_length,
        mtp_on_this_rank=mtp,
        pipeline_model_parallel_size=args.pipeline_model_parallel_size,
        is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
        is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
    )
    batch = compat.flatten_packed_batch(batch)
    if not at_an_end:
        metadata = ("cu_seqlens", "cu_seqlens_padded", "max_seqlen")
        return Batch(**{key: batch[key] for key in metadata})
    batch = compat.batch_on_this_cp_rank(
        batch,
        per_sequence=_masks_documents(args),
        is_hybrid_cp=args.hybrid_context_parallel,
        cp_group=mpu.get_context_parallel_group(),
        hybrid_cp_group_func=get_hybrid_data_context_parallel_groups,
    )
    return Batch(**{key: batch.get(key) for key in Batch._fields})


def _micro_batch_size(args: Any, batch: dict[str, Any]) -> int:
    """Samples of a micro-batch that is not trained on, on ranks that do not read it too.

    It is one of an evaluation, or one of training whose samples run through a model in evaluation
    mode. Only who reads it knows which.

    Collectives: one broadcast of one number over the tensor-parallel group, where the sizes differ.
    """
    sizes = (args.micro_batch_size, args.eval_micro_batch_size)
    group = mpu.get_tensor_model_parallel_group()
    if sizes[0] == sizes[1] or group.size() == 1:
        return sizes[0]
    known = [len(value) for name in ("tokens", "labels") if (value := batch.get(name)) is not None]
    size = torch.tensor(known[:1] or [0], device=torch.cuda.current_device())
    torch.distributed.broadcast(size, mpu.get_tensor_model_parallel_src_rank(), group=group)
    return int(size)


def packed_seq_params(batch: Batch, tokens_per_sample: int) -> PackedSeqParams | None:
    """Attention metadata of a packed batch, ``None`` for an ordinary one.

    Attention gets the padded boundaries where they exist, as the stock entry does; the FLOP
    count gets the real ones.
    """
    if batch.cu_seqlens is None:
        return None
    real = batch.cu_seqlens.squeeze(0)
    update_seqlen_stats_from_cu_seqlens(real)
    padded = None if batch.cu_seqlens_padded is None else batch.cu_seqlens_padded.squeeze(0)
    boundaries = real if padded is None else padded
    assert batch.max_seqlen is not None, "packed documents come with the longest length"
    longest = int(batch.max_seqlen.item())
    fields = {
        "qkv_format": "thd",
        "cu_seqlens_q": boundaries,
        "cu_seqlens_kv": boundaries,
        "cu_seqlens_q_padded": padded,
        "cu_seqlens_kv_padded": padded,
        "max_seqlen_q": longest,
        "max_seqlen_kv": longest,
        "local_cp_size": None if batch.local_cp_size is None else int(batch.local_cp_size.item()),
        "cp_group": batch.hybrid_cp_group,
        "tokens_per_sample": tokens_per_sample,
    }
    return PackedSeqParams(**compat.accepted(PackedSeqParams, fields))


def blend_of(args: Any) -> tuple[Any, Any]:
    """Prefixes and weights of the data flags for all splits, or by split; None for the other."""
    return get_blend_and_blend_per_split(args)


def dataset_config(args: Any) -> GPTDatasetConfig:
    """``GPTDatasetConfig`` of Megatron's data flags."""
    blend, blend_per_split = blend_of(args)
    sequences_per_dataset = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path) as file:
            sequences_per_dataset = json.load(file)
    fields = {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "split": args.split,
        "multiple_validation_sets": args.multiple_validation_sets,
        "full_validation": args.full_validation,
        "num_dataset_builder_threads": args.num_dataset_builder_threads,
        "path_to_cache": args.data_cache_path,
        "mmap_bin_files": args.mmap_bin_files,
        "tokenizer": build_tokenizer(args),
        "reset_position_ids": args.reset_position_ids,
        "reset_attention_mask": args.reset_attention_mask,
        "eod_mask_loss": args.eod_mask_loss,
        "create_attention_mask": args.create_attention_mask_in_dataloader,
        "object_storage_cache_path": args.object_storage_cache_path,
        "mid_level_dataset_surplus": args.mid_level_dataset_surplus,
        "allow_ambiguous_pad_tokens": args.allow_ambiguous_pad_tokens,
        "fast_cache_load": args.dataloader_fast_cache_load,
        "sequences_per_dataset": sequences_per_dataset,
        "defer_npy_index_mmap": args.dataloader_defer_npy_index_mmap,
        "context_parallel_size": args.context_parallel_size,
        "data_parallel_size": args.data_parallel_size,
        "sequence_parallel_size": args.tensor_model_parallel_size * args.sequence_parallel,
        "hybrid_context_parallel": args.hybrid_context_parallel,
        "inter_document_masking": _masks_documents(args),
    }
    return GPTDatasetConfig(**compat.accepted(GPTDatasetConfig, fields))


def reads_data(config: Any, packed: bool, vp_stage: int | None) -> bool:
    """Whether this rank reads the dataset: tensor-parallel rank 0 of the stages that need it."""
    if mpu.get_tensor_model_parallel_rank() != 0:
        return False
    return packed or is_first_or_last_pipeline_stage(vp_stage) or has_mtp(config, vp_stage)


def datasets_provider(num_samples: list[int], vp_stage: int | None = None) -> tuple:
    """Train, validation and test datasets of ``num_samples`` each, built on the ranks that read."""
    args = get_args()
    reads = partial(reads_data, core_transformer_config_from_args(args), is_packed(args), vp_stage)
    print_rank_0("> building GPT datasets ...")
    kind: Any = MockGPTDataset if args.mock_data else GPTDataset
    if args.sft:
        kind = SFTDataset
    return BlendedMegatronDatasetBuilder(kind, num_samples, reads, dataset_config(args)).build()


datasets_provider.is_distributed = True  # type: ignore[attr-defined]  # Megatron's mark
