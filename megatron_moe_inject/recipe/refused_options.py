"""Megatron options that the plugin, or several features of it, do not work with, and why.

What a single feature refuses stands with it (``Feature.refuses``).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Refusal:
    """A Megatron option that the plugin does not work with.

    Attributes:
        value: the option's refused value; None refuses every value that is set.
        unset: a value that is as good as none.
        written: the flag that sets the option, where it has another name.
        since: the first Megatron-Core that has it, where no released one that is supported has.
    """

    name: str
    reason: str
    value: str | None = None
    unset: int | None = None
    written: str | None = None
    since: str | None = None

    @property
    def flag(self) -> str:
        flag = "--" + {"fp8": "fp8-format", "fp4": "fp4-format"}.get(self.name, self.name)
        flag = self.written or flag.replace("_", "-")
        return flag if self.value is None else f"{flag} {self.value}"

    def matches(self, options: Mapping[str, Any]) -> bool:
        option = options.get(self.name)
        if self.value is not None:
            return option == self.value or (isinstance(option, list) and self.value in option)
        return bool(option) and option != "none" and option != self.unset


_OUTPUT_LAYER = "the output layer's own forward pass, in whose place the loss is computed"
_LOGITS = "saves logits, which the loss never forms whole"
_SHARDS_WEIGHTS = "stores each weight in parts that only its own layer's forward pass puts together"
_SHARDS = "shards the parameters before they can be frozen"
GRAPHS_OF_LAYERS = Refusal("cuda_graph_impl", "replays layers without the losses on their states")
_ONE_PARAMETER = "keeps all experts of a layer in one parameter"
_OWN_GRADIENTS = "makes the weight gradients of a layer's grouped experts all at once"
NO_PARTS = (
    Refusal("moe_single_grouped_weight", _ONE_PARAMETER),
    Refusal("moe_single_grouped_bias", _ONE_PARAMETER),
    Refusal("use_transformer_engine_op_fuser", _OWN_GRADIENTS),
    Refusal("delay_wgrad_compute", _OWN_GRADIENTS),
    Refusal("overlap_dispatch_backward_with_experts_wgrad", _OWN_GRADIENTS),
    Refusal("moe_paged_stash", "keeps the rows of a layer's grouped experts all together"),
    Refusal("te_precision_config_file", "gives single layers precisions of their own"),
)
FP8_PARAMETERS = Refusal(
    "fp8_param_gather", "keeps what trains in FP8, whose copies stay beside it"
)
REFUSED = (
    Refusal("yaml_cfg", "replaces the command line and loses the plugin's flags"),
    Refusal("use_megatron_fsdp", _SHARDS),
    Refusal("use_torch_fsdp2", _SHARDS),
    Refusal("hybrid_context_parallel", "regroups the micro-batches of a step"),
    Refusal("moe_use_upcycling", "makes all experts of a layer copies of one dense MLP"),
    Refusal("init_model_with_meta_device", "leaves no weights to check while freezing"),
    Refusal("perform_rl_step", "replaces the training step"),
    Refusal("modelopt_enabled", "replaces the model and its loss"),
    Refusal("logits_load_dir", "distils stored logits with a loss of its own"),
    Refusal("cuda_graph_impl", "captures the whole step, teacher included", value="full_iteration"),
    Refusal("freeze_all_layers", "freezes what the recipe trains"),
    Refusal("defer_embedding_wgrad_compute", f"is part of {_OUTPUT_LAYER}"),
    Refusal("fp8_output_proj", f"puts into FP8 {_OUTPUT_LAYER}"),
    Refusal("save_activations_interval", f"records {_OUTPUT_LAYER}"),
    Refusal("save_dgrads_interval", f"records {_OUTPUT_LAYER}"),
    Refusal("logits_save_dir", _LOGITS),
    Refusal("config_logger_dir", _LOGITS),
    Refusal(
        "gtp_weight_remat_size", _SHARDS_WEIGHTS, unset=1,
        written="--tensor-parallel-num-weight-shards",
    ),
    Refusal(
        "expert_gtp_weight_remat_size", _SHARDS_WEIGHTS, unset=1,
        written="--expert-tensor-parallel-num-weight-shards",
    ),
    Refusal(
        "enable_mhc_connections", "carries several residual streams through the layers, which "
        "neither the gradient boundary nor losses on states tell apart", since="0.20",
    ),
    Refusal(
        "moe_use_grouped_tensor", "tells grouped experts how many rows each gets on the device "
        "alone, with padding between them", since="0.20",
    ),
    Refusal(
        "ckpt_pg_tensors_cache_path", "takes from a file which rank saves what, and a file of a "
        "run that trains something else leaves out optimizer state without a word", since="0.20",
    ),
    Refusal(
        "logit_dtype", f"gives another precision to {_OUTPUT_LAYER}", since="0.20",
        written="--output-logit-dtype",
    ),
)  # fmt: skip
"""What no recipe works with."""
