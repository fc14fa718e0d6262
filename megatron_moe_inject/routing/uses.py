"""What ``routing`` uses of Megatron, and what it wraps."""

from megatron_moe_inject.host.contract import Contract, Hooked, Use, Wrapped, symbols
from megatron_moe_inject.host.uses import ROUTER

_LOSS = ("probs", "scores_for_aux_loss", "routing_map")
_GENERAL_ONLY = "leaves tokens of domains out"

DOOR_ROUTING = Wrapped(
    f"{ROUTER}.routing", ("logits",), does="with routing.open: keeps new experts back"
)
DOOR = Contract(
    "routing.open",
    (
        DOOR_ROUTING,
        Hooked(ROUTER, kind="load_state_dict post-hook", does="takes away what closed new experts"),
        Use(
            ROUTER,
            attributes=("bias", "config", "expert_bias", "local_tokens_per_expert", "weight"),
        ),
    ),
)

STEERED_GATING = Wrapped(
    f"{ROUTER}.gating", ("input",), does="with steering.retention: the original router's logits"
)
STEERED_ROUTING = Wrapped(f"{ROUTER}.routing", ("logits",), does="attaches the losses to the gates")
AUX_LOSS = Wrapped(f"{ROUTER}._apply_aux_loss", _LOSS, does=_GENERAL_ONLY)
SEQUENCE_LOSS = Wrapped(
    f"{ROUTER}._apply_seq_aux_loss", (*_LOSS, "seq_length", "bsz"), does=_GENERAL_ONLY
)
GLOBAL_LOSS = Wrapped(f"{ROUTER}._apply_global_aux_loss", _LOSS, does=_GENERAL_ONLY)
ATTACHED_LOSS = Wrapped(
    f"{ROUTER}.attach_and_log_load_balancing_loss",
    ("needs_dp_avg", "valid_token_count"),
    does="with --calculate-per-token-loss: weighs what is left by all tokens",
)
BIAS_COUNTS = Wrapped(
    f"{ROUTER}._apply_expert_bias",
    ("routing_map", "padding_mask"),
    does="weighs tokens of domains by steering.bias_counts",
)
STEERING = Contract(
    "steering",
    (
        STEERED_GATING,
        STEERED_ROUTING,
        AUX_LOSS,
        SEQUENCE_LOSS,
        GLOBAL_LOSS,
        ATTACHED_LOSS,
        BIAS_COUNTS,
        Use(
            ROUTER,
            attributes=(
                "bias",
                "calculate_per_token_loss",
                "config",
                "enable_expert_bias",
                "ga_steps",
                "get_aux_loss_coeff",
                "global_tokens_per_expert",
                "local_tokens_per_expert",
                "tp_dp_cp_group",
                "weight",
            ),
        ),
        *symbols("megatron.core.transformer.moe.moe_utils", "router_gating_linear"),
        *symbols("megatron.core.tensor_parallel", "reduce_from_tensor_model_parallel_region"),
        *symbols("megatron.training", "get_tensorboard_writer", "get_wandb_writer"),
    ),
)

ROWS_GATING = Wrapped(
    f"{ROUTER}.gating", ("input",), does="puts the trained rows' logits in their places"
)
ROWS_SHARDED = Wrapped(
    f"{ROUTER}.sharded_state_dict", ("prefix",), does="saves the rows beside the whole router"
)
ROUTER_ROWS = Contract(
    "train.router_rows",
    (
        ROWS_GATING,
        ROWS_SHARDED,
        Hooked(ROUTER, kind="state_dict pre-hook", does="writes the rows into the whole router"),
        Hooked(ROUTER, kind="load_state_dict post-hook", does="takes the rows from it"),
        Use(ROUTER, attributes=("bias", "weight")),
        *symbols("megatron.core.transformer.moe.moe_utils", "router_gating_linear"),
    ),
)
