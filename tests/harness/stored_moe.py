"""Checkpoints of a small MoE that no Megatron made: each way in which experts can be stored."""

from argparse import Namespace
from pathlib import Path

import torch

from megatron_moe_inject.host.torch_dist_write import CheckpointWriter

LAYERS, EXPERTS, HIDDEN, WIDTH = 3, 4, 6, 5
FORMS = ("stacked", "joined", "by_layer", "named")
"""``stacked``: a part for each half of each expert's first matrix; ``joined``: a part for all
experts of a layer; ``by_layer``: a tensor for each layer; ``named``: a tensor for each expert."""
STATES = ("exp_avg", "exp_avg_sq", "fp32_param")


def arguments(**changed) -> Namespace:
    """Of the run that would have saved it."""
    given = {
        "num_layers": LAYERS,
        "num_experts": EXPERTS,
        "expert_model_parallel_size": 1,
        "moe_router_topk": 2,
        "moe_router_num_groups": None,
        "moe_router_group_topk": None,
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax",
        "moe_router_topk_scaling_factor": None,
        "moe_router_load_balancing_type": "aux_loss",
        "moe_expert_capacity_factor": None,
        "init_method_std": 0.02,
    }
    return Namespace(**given | changed)


def write_moe(
    root: Path,
    form: str = "stacked",
    *,
    bias: str | None = None,
    states: bool = False,
    dtype: torch.dtype = torch.float32,
    experts: int = EXPERTS,
    layers: int = LAYERS,
    **changed,
) -> Path:
    """Write ``iter_0000007`` into ``root``; random values, the same for every form.

    Args:
        form: one of ``FORMS``.
        bias: a bias of routers, ``expert_bias`` or ``bias``.
        states: with the optimizer's, of which ``fp32_param`` has more digits than the model.
        experts, layers: how many.
        changed: arguments.
    """
    torch.manual_seed(1)
    whole = {
        "mlp.experts.experts.linear_fc1.weight": torch.randn(layers, experts, 2 * WIDTH, HIDDEN),
        "mlp.experts.experts.linear_fc2.weight": torch.randn(layers, experts, HIDDEN, WIDTH),
        "mlp.router.weight": torch.randn(layers, experts, HIDDEN),
        "self_attention.linear_proj.weight": torch.randn(layers, HIDDEN, HIDDEN),
    }
    if bias:
        whole[f"mlp.router.{bias}"] = torch.randn(layers, experts)
    with CheckpointWriter(root / "iter_0000007", chunk_bytes=1 << 20) as writer:
        for name, value in whole.items():
            kept = torch.float32 if "expert_bias" in name else dtype
            _write(writer, form, "", name, value.to(kept))
            for state in STATES if states and "expert_bias" not in name else ():
                of_state = value if state == "fp32_param" else torch.randn(value.shape).abs()
                _write(writer, form, f"optimizer.state.{state}.", name, of_state)
        writer.tensor(["output_layer.weight"], (7, HIDDEN), (), torch.randn(7, HIDDEN))
        writer.nothing(_objects(form, experts, layers))
        sizes = {"num_experts": experts, "num_layers": layers}
        writer.finish(
            {"args": arguments(**sizes | changed), "iteration": 7, "checkpoint_version": 3.0}
        )
    (root / "latest_checkpointed_iteration.txt").write_text("7")
    return root


def _write(writer, form: str, prefix: str, name: str, value: torch.Tensor) -> None:
    size = tuple(value.shape)
    experts = ".experts." in name
    for layer, of_layer in enumerate(value):
        stacked = f"{prefix}decoder.layers.{name}"
        if form == "by_layer":
            alone = f"{prefix}decoder.layers.{layer}.{name}"
            if not experts:
                writer.tensor([alone], size[1:], (), of_layer)
                continue
            for expert, own in enumerate(of_layer):
                writer.tensor([alone], size[1:], (expert,), own)
        elif form == "joined" or not experts:
            writer.tensor([stacked], size, (layer,), of_layer)
        else:
            for expert, own in enumerate(of_layer):
                if form == "named":
                    of_one = stacked.replace("experts.experts.", f"experts.experts.{expert}.")
                    writer.tensor([of_one], (size[0], *size[2:]), (layer,), own)
                    continue
                for begin, half in zip((0, len(own) // 2), own.split(len(own) // 2), strict=True):
                    writer.tensor([stacked], size, (layer, expert, begin), half)


def _objects(form: str, number: int, layers: int):
    experts = "mlp.experts.experts"
    for layer in range(layers):
        for expert in range(number):
            if form == "by_layer":
                name, place = f"decoder.layers.{layer}.{experts}", f"{expert}_{number}"
            elif form == "named":
                name, place = f"decoder.layers.{experts}.{expert}", f"{layer}_{layers}"
            else:
                name, place = f"decoder.layers.{experts}", f"{layer}.{expert}_{layers}.{number}"
            yield f"{name}.linear_fc1._extra_state/shard_{place}"
        yield f"decoder.layers.self_attention.linear_proj._extra_state/shard_{layer}_{layers}"


def read(checkpoint, form: str, name: str, prefix: str = "") -> torch.Tensor:
    """A tensor with its axes of layers and experts in front, whatever the form."""
    from tests.harness.checkpoints import whole

    stacked = f"{prefix}decoder.layers.{name}"
    if form == "by_layer":
        layers = range(checkpoint.args.num_layers)
        parts = [f"{prefix}decoder.layers.{layer}.{name}" for layer in layers]
        return torch.stack([whole(checkpoint, part) for part in parts])
    if form == "named" and ".experts." in name:
        parts, expert = [], 0
        while True:
            part = stacked.replace("experts.experts.", f"experts.experts.{expert}.")
            if part not in checkpoint.tensors:
                return torch.stack(parts, 1)
            parts.append(whole(checkpoint, part))
            expert += 1
    return whole(checkpoint, stacked)
