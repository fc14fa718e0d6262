"""What ``preference`` uses of Megatron."""

from megatron_moe_inject.host.contract import Contract, Use, symbols

PREFERENCE = Contract(
    "objective.preference",
    (
        Use("megatron.core.tensor_parallel.gather_from_sequence_parallel_region", ("group",)),
        Use(
            "megatron.core.datasets.gpt_dataset.GPTDataset",
            attributes=("config", "dataset", "indices"),
        ),
        Use(
            "megatron.core.datasets.indexed_dataset.IndexedDataset",
            attributes=("document_indices", "get", "sequence_lengths"),
        ),
        *symbols("megatron.core.datasets.blended_dataset", "BlendedDataset"),
    ),
)
