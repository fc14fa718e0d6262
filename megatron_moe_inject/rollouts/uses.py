"""What ``rollouts`` uses of Megatron."""

from megatron_moe_inject.host.contract import Contract, Use, symbols

READING = Contract(
    "rollouts: in data",
    symbols("megatron.training.datasets.data_samplers", "MegatronPretrainingSampler"),
)
"""Whose order of a batch among data-parallel ranks ``lanes`` follows."""

WRITING = Contract(
    "moe-inject rollouts",
    (
        Use(
            "megatron.core.pipeline_parallel.schedules.get_forward_backward_func",
        ),
        Use(
            "megatron.core.pipeline_parallel.schedules.forward_backward_no_pipelining",
            (
                "forward_step_func",
                "data_iterator",
                "model",
                "num_microbatches",
                "seq_length",
                "micro_batch_size",
                "forward_only",
                "collect_non_loss_data",
            ),
        ),
        Use(
            "megatron.core.inference.contexts.StaticInferenceContext",
            ("max_batch_size", "max_sequence_length"),
            ("enable_decode_mode", "sequence_len_offset"),
        ),
        Use("megatron.core.models.gpt.GPTModel.forward", ("inference_context",)),
        Use(
            "megatron.core.datasets.indexed_dataset.IndexedDataset",
            attributes=("document_indices", "get", "sequence_lengths"),
        ),
    ),
)
