"""What ``data`` uses of Megatron."""

from megatron_moe_inject.host.contract import Contract, Use, symbols

VALIDATION_SETS = Contract(
    "several validation sets",
    (
        *symbols("megatron.core.datasets.utils", "Split"),
        *symbols("megatron.core.datasets.utils.Split", "test"),
    ),
)

HELD_OUT_PAIRS = Contract(
    "held-out pairs of answers",
    (
        Use(
            "megatron.core.datasets.indexed_dataset.IndexedDataset",
            ("mmap",),
            ("document_indices", "get", "sequence_lengths"),
        ),
        *symbols("megatron.core.datasets.utils", "Split"),
        *symbols("megatron.core.datasets.utils.Split", "test"),
        Use(
            "megatron.training.training.evaluate",
            ("forward_step_func", "data_iterator", "model", "config", "eval_iters"),
        ),
    ),
)

PREPARE = Contract(
    "prepare-data",
    (
        Use(
            "megatron.core.datasets.indexed_dataset.IndexedDatasetBuilder",
            ("dtype",),
            ("add_document", "finalize"),
        ),
        *symbols("megatron.core.datasets.indexed_dataset", "DType"),
        *symbols("megatron.core.datasets.indexed_dataset.DType", "optimal_dtype"),
    ),
)

MIXING = Contract(
    "mixing",
    (
        *symbols("megatron.training.utils", "get_blend_and_blend_per_split"),
        *symbols("megatron.core", "mpu"),
        *symbols("megatron.core.parallel_state", "get_data_parallel_world_size"),
        *symbols("megatron.core.datasets.blended_dataset", "BlendedDataset"),
    ),
)

PLACES = Contract(
    "teachers from store:",
    (
        Use(
            "megatron.core.datasets.gpt_dataset.GPTDataset",
            attributes=("config", "dataset", "document_index", "sample_index", "shuffle_index"),
        ),
        *symbols("megatron.core.datasets.blended_dataset", "BlendedDataset"),
    ),
)
