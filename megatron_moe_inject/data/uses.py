"""What ``data`` uses of Megatron."""

from megatron_moe_inject.host.contract import Contract, symbols

VALIDATION_SETS = Contract(
    "several validation sets",
    (
        *symbols("megatron.core.datasets.utils", "Split"),
        *symbols("megatron.core.datasets.utils.Split", "test"),
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
