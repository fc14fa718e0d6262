"""Routing profiles for tests: counted from tokens that are routed at random, so they add up."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_moe_inject.experts.choose.routing_profile import (
    ClassStatistics,
    Provenance,
    RouterSettings,
    RoutingProfile,
    Spread,
)

ROOT = Path(__file__).resolve().parents[2]
ESFT = Path(os.environ.get("INJECT_SHARED", ROOT.parent / "shared")) / "data" / "esft"
"""Scores and choices published with ESFT; ``shared`` lies beside the checkout."""


def provenance(experts=8, topk=2, moe_layers=(1, 2, 3), **changes):
    return Provenance(
        **{
            "checkpoint": "/ckpt/student",
            "first_iteration": 100,
            "last_iteration": 100,
            "megatron_version": "0.19.2",
            "sequence_length": 16,
            "num_layers": max(moe_layers) + 1,
            "moe_layers": list(moe_layers),
            "parameters": 10_000 * len(moe_layers) * experts,
            "expert_parameters": 1000,
            "router": RouterSettings(experts, topk),
            **changes,
        }
    )


def statistics(
    source, seed=0, sequences=20, liking=None, spread=True, pairs=True, dropped=False, data=()
):
    """Counts of ``sequences`` sequences whose tokens choose experts at random.

    Args:
        liking: ``[E]`` or ``[L, E]``, added to every token's random logits.
    """
    layers, experts = source.shape
    topk, length = source.router.topk, source.sequence_length
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(layers, sequences, length, experts))
    logits += rng.normal(size=(layers, sequences, 1, experts)) / 2
    if liking is not None:
        logits += np.broadcast_to(np.asarray(liking, float), (layers, experts))[:, None, None]
    probs = np.exp(logits)
    probs /= probs.sum(-1, keepdims=True)
    chosen = logits >= np.sort(logits, -1)[..., -topk][..., None]
    shares = chosen.sum(2) / (topk * length)
    flat = chosen.reshape(layers, -1, experts).astype(np.int64)
    together = flat.transpose(0, 2, 1) @ flat
    together[:, np.arange(experts), np.arange(experts)] = 0
    selections = flat.sum(1)
    return ClassStatistics(
        data=tuple(data),
        tokens=np.full(layers, sequences * length),
        selections=selections,
        gate_sums=(probs * chosen).sum((1, 2)),
        prob_sums=probs.sum((1, 2)),
        spread=Spread(sequences, shares.sum(1), (shares**2).sum(1)) if spread else None,
        dropped=selections // 3 if dropped else None,
        coselections=together if pairs else None,
    )


def profile(seed=0, names=("code", "general"), liking=(0, 0, 2, 0, 0, 1, 0, 0), **changes):
    """A profile with a class per name; all but ``general`` like some experts more."""
    source = provenance(**changes)
    return RoutingProfile(
        source,
        {
            name: statistics(
                source,
                10 * seed + i,
                liking=None if name == "general" else liking,
                data=[f"/data/{name}"],
            )
            for i, name in enumerate(names)
        },
    )


def from_counts(selections, gate_sums=None, topk=1, general=None, **changes):
    """A profile whose class ``code`` has exactly these ``[L, E]`` counts, and ``general`` these."""
    selections = np.asarray(selections, dtype=np.int64)
    layers, experts = selections.shape
    source = provenance(experts, topk, tuple(range(layers)), **changes)

    def counted(counts, gates=None):
        tokens = counts.sum(1) // topk
        return ClassStatistics(
            (),
            tokens,
            counts,
            counts / topk if gates is None else np.asarray(gates, dtype=np.float64),
            np.repeat(tokens[:, None] / experts, experts, 1),
        )

    classes = {"code": counted(selections, gate_sums)}
    if general is not None:
        classes["general"] = counted(np.asarray(general, dtype=np.int64))
    return RoutingProfile(source, classes)


def changed(found, name, **fields):
    """The profile with fields of one class replaced."""
    return replace(found, classes={**found.classes, name: replace(found.classes[name], **fields)})
