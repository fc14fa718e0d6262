"""What converting models uses of Megatron."""

from megatron_moe_inject.host.contract import Contract, symbols

IMPORT = Contract("import-hf", symbols("megatron.training.arguments", "add_megatron_arguments"))
