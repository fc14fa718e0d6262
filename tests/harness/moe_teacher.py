"""Mixtures of experts as teachers: small ones, trained for a moment on the domain and saved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from tests.harness import lane
from tests.harness.material import Material

_EXPERTS = ("--num-experts", "4", "--moe-ffn-hidden-size", "40")
KINDS: dict[str, tuple[str, ...]] = {
    # A dense layer first, shared experts, sigmoids with groups and a bias that training moves.
    "deepseek": (
        *(*_EXPERTS, "--moe-router-topk", "1", "--num-layers", "3", "--moe-layer-freq", "[0,1,1]"),
        *lane.DEEPSEEK_ROUTER,
        *("--moe-router-bias-update-rate", "0.05", "--moe-router-load-balancing-type", "none"),
    ),
    "softmax": (*_EXPERTS, "--moe-router-topk", "2", "--moe-router-pre-softmax"),
    "hybrid": (*_EXPERTS, "--moe-router-topk", "2", "--hybrid-layer-pattern", "*E*-E"),
}
"""What is computed, by name."""
ONLY_TRAINING = {
    "softmax": (
        *("--moe-router-load-balancing-type", "aux_loss", "--moe-aux-loss-coeff", "0.01"),
        *("--moe-z-loss-coeff", "0.01", "--moe-input-jitter-eps", "0.3"),
        *("--moe-expert-capacity-factor", "1.0"),
    )
}
"""What a teacher was trained with and does not do as one."""


def flags_of(kind: str, *extra: str, **layout: int) -> list[str]:
    """Flags of a model of ``KINDS``, on data that ``extra`` names."""
    return [
        *(flag for flag in lane.dense(**layout) if flag != "--mock-data"),
        *("--hidden-size", "48", "--ffn-hidden-size", "64", "--vocab-size", "61"),
        *("--make-vocab-size-divisible-by", "8", "--moe-token-dispatcher-type", "alltoall"),
        *("--lr", "1e-2", *KINDS[kind], *extra),
    ]


def with_teacher(material: Material, kind: str, pythonpath: Sequence[str] = ()) -> Material:
    """The material with a teacher of ``KINDS``, trained on the domain when first wanted."""
    path = material.folder / f"teacher with experts, {kind}"
    if not path.exists():
        data = ("--data-path", material.domain, "--split", "90,5,5", "--train-iters", "10")
        data += ("--eval-iters", "0")
        keep = ("--save", str(path), "--save-interval", "100")
        only = ONLY_TRAINING.get(kind, ())
        lane.run([*flags_of(kind, *data, *keep, *only)], pythonpath=pythonpath)
    return replace(material, teacher=str(path))
