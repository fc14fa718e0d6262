"""How often new experts would be chosen, on the router logits that a profile has sampled.

A row that is the mean of its layer's, or a copy, gives a logit that follows from the old ones. So
what the grown router chooses for a sampled token is known without a run, at any size of model, as
long as what comes into the layer is what it was; it is, where no new expert is chosen below.

Shapes: L MoE layers, n sampled tokens of a class, E experts, E' with new ones, k chosen.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from megatron_moe_inject.experts.choose.router_logits import LogitSample, read_logits
from megatron_moe_inject.experts.grow.stored_names import ExpertName, Layer, expert_name
from megatron_moe_inject.host.errors import RecipeError, fail

if TYPE_CHECKING:
    from megatron_moe_inject.experts.grow.add import Addition


@dataclass(frozen=True)
class Bounds:
    """What a function that is kept may move by.

    Attributes:
        chosen: share of a layer's choices that new experts may get.
        loss: nats per token, either way.
    """

    chosen: float = 0.01
    loss: float = 0.001

    @classmethod
    def of(cls, options: argparse.Namespace) -> Bounds:
        """From the command's options.

        Raises:
            RecipeError: one is out of range.
        """
        given = {}
        for flag, name in (("--most-chosen", "chosen"), ("--most-loss", "loss")):
            value = getattr(options, flag.strip("-").replace("-", "_"))
            if value is None:
                continue
            if not 0 <= value <= 1:
                raise fail(flag, value, "is not between 0 and 1", f"write {getattr(cls, name)}")
            given[name] = value
        return cls(**given)

    def check_chosen(self, share: float, where: str) -> None:
        """Raises ``RecipeError`` where new experts are chosen too often."""
        if share > self.chosen:
            raise RecipeError(
                f"--most-chosen: new experts would get {share:.2%} of the choices of {where}, more "
                f"than {self.chosen:.2%}, and the model would not be what it was; raise the bound "
                "if that is meant",
                "--most-chosen",
            )


def chosen_share(addition: Addition) -> dict[str, dict[int, float]]:
    """By class of the profile and layer the share of choices that new experts get; empty without
    sampled logits.

    Raises:
        RecipeError: the sample is damaged.
    """
    profile, path = addition.profile, addition.asked.profile
    if profile is None or path is None or profile.logits is None:
        return {}
    samples = read_logits(path, profile)
    layers = profile.provenance.moe_layers
    return {
        name: {
            layer: _share(addition, sample, row, layer)
            for row, layer in enumerate(layers)
            if sample.logits.shape[1]
        }
        for name, sample in samples.items()
    }


def check_measured(addition: Addition, shares: Mapping[str, Mapping[int, float]]) -> None:
    """Whether it is known by how much the function moves, where it does and is not meant to.

    Args:
        shares: by ``chosen_share``.

    Raises:
        RecipeError: it is not; with what would measure it.
    """
    if addition.exact:
        return
    if addition.takes_weight:
        raise RecipeError(
            "--rows: the routers take the softmax over all experts before they choose "
            "(--moe-router-pre-softmax) and have no bias of their own, so that any new expert "
            "takes weight from all others, even where it is not chosen; add --check -- <flags of "
            "the training command> to measure by how much the loss moves, or --unmeasured, and "
            "open new experts gradually as they train (routing.open)",
            "--rows",
        )
    if addition.rows.method != "donor" and not any(shares.values()):
        raise RecipeError(
            "--rows: a new expert is chosen where the mean of a token's logits is among the k "
            "best, and how often that is was not measured; add --profile FILE that was recorded "
            "with --logits N, or --check -- <flags of the training command>, or --unmeasured to "
            "write it all the same",
            "--rows",
        )


def _share(addition: Addition, sample: LogitSample, row: int, layer: int) -> float:
    """Of one class in one layer, over ``n k`` choices."""
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    args, rows = addition.args, addition.rows
    old = torch.from_numpy(sample.logits[row])
    # A logit is linear in its row: the rows' own rule gives the new logits.
    of_router = {
        kind: ExpertName(kind, kind, None, kind, None) for kind in ("weight", "bias", "expert_bias")
    }
    place: Layer = (False, layer)
    grown = rows(of_router["weight"], place, old.T.contiguous()).T
    bias = _expert_bias(addition, layer)
    if bias is not None:
        bias = rows(of_router["expert_bias"], place, bias)
    if rows.in_layer(place) == "closed" and rows.closes_by == "bias":
        grown[:, list(addition.numbering.new)] = -1e4
    _, chosen = topk_routing_with_score_function(
        grown.contiguous(),
        args.moe_router_topk,
        use_pre_softmax=bool(args.moe_router_pre_softmax),
        num_groups=args.moe_router_num_groups,
        group_topk=args.moe_router_group_topk,
        scaling_factor=args.moe_router_topk_scaling_factor,
        score_function=rows.score_function,
        expert_bias=bias,
        fused=False,
    )
    new = chosen[:, list(addition.numbering.new)]
    return float(new.sum()) / float(chosen.sum())


def _expert_bias(addition: Addition, layer: int) -> torch.Tensor | None:
    """``[E]`` of the checkpoint, ``None`` of routers without."""
    from megatron_moe_inject.host.torch_dist import Piece

    checkpoint = addition.checkpoint
    for name, stored in checkpoint.tensors.items():
        known = expert_name(name)
        if known is None or known.kind != "expert_bias" or known.of_prediction:
            continue
        size = tuple(stored.size)
        if not known.layers_axis and known.layer() != (False, layer):
            continue
        value = torch.empty(size[-1])
        offset = (layer, 0) if known.layers_axis else (0,)
        checkpoint.read([Piece(name, size, offset, value)])
        return value
    return None


def chosen_lines(
    addition: Addition,
    shares: Mapping[str, Mapping[int, float]],
    bounds: Bounds,
    *,
    checked: bool,
) -> list[str]:
    """What was measured, in words.

    Args:
        addition: planned.
        shares: by ``chosen_share``.
        bounds: for rows that are to keep the function.
        checked: whether both models will be run.

    Raises:
        RecipeError: new experts get too many choices, and their rows were to keep the function.
    """
    rows = addition.rows.method
    if not any(shares.values()):
        if addition.exact or checked:
            return []
        return [
            "by how much the model's function moves was not measured: compare both models before "
            "training (moe-inject evaluate and profile)"
        ]
    lines = []
    for name, by_layer in shares.items():
        if not by_layer:
            continue
        worst = max(by_layer, key=lambda layer: by_layer[layer])
        if rows != "donor":
            bounds.check_chosen(by_layer[worst], f"layer {worst} on {name}")
        mean = sum(by_layer.values()) / len(by_layer)
        lines.append(
            f"new experts get {mean:.3%} of the choices of {name}, at most {by_layer[worst]:.3%} "
            f"(layer {worst}), on the profile's router logits"
        )
    return lines
