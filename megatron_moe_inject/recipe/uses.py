"""What reading a recipe and the student's flags uses of Megatron."""

from megatron_moe_inject.host.contract import Contract, symbols

RECIPE = Contract(
    "every run",
    (
        *symbols("megatron.training.arguments", "add_megatron_arguments"),
        *symbols("megatron.training.utils", "get_blend_and_blend_per_split"),
        *symbols(
            "megatron.core.datasets.blended_megatron_dataset_config",
            "convert_split_vector_to_split_matrix",
            "parse_and_normalize_split",
        ),
    ),
)
