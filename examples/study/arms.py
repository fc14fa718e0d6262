"""What the study compares: each arm as a recipe, and how long it trains.

An arm says what trains (everything, the experts that the domain's profile chooses, or as many
random ones), on what (the domain's slice alone, or with English mixed in) and towards what (the
text, or the teacher's distribution). Everything else is the same for all arms: student, slice,
steps, batch, seed. Cross-entropy memorises a small slice, so its arms are measured often and count
at their best held-out domain loss; that choice looks at the text it is judged by, which favours
them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path

LAYERS, EXPERTS, CHOSEN = 4, 8, 2
"""MoE layers of the quickstart's student, experts of a layer, and how many of them train."""
QUARTER = {"method": "budget", "budget": 10 / 32, "budget_of": "routed", "score": "contrast"}
"""As many experts as a quarter of the student's parameters can hold, wherever they are."""
EVERYTHING = {
    "experts": "all",
    **dict.fromkeys(("router", "attention", "norms", "embedding", "output_layer"), True),
}
GENERAL_SHARE = 0.1
EVALUATIONS = 6
"""Evaluations of an arm that stops early, besides the one before its first step."""


@dataclass(frozen=True)
class Arm:
    """One way to teach the domain.

    Attributes:
        name: as in the table.
        experts: ``all`` trains the whole student; ``chosen``, ``random``, ``quarter`` some experts,
            ``new`` those by which the student has grown; ``none`` none of them.
        taught: by the teacher's distribution; otherwise by cross-entropy.
        mixed: English is a tenth of the batch.
        gamma: weight of the KL to the original on it.
        retention: the recipe's ``retention``. Without it and gamma English counts by
            cross-entropy.
        router: the routers train.
        steering: the recipe's ``steering``.
        rate: peak learning rate.
        adapters: the recipe's ``train.adapters``; of experts none but new ones train beside them.
        rows: share of the vocabulary's rows that train, those that the domain's text uses most.
        embedding: the matrix that embedding and output layer share trains.
        grown: options of ``moe-inject add-experts``, by which the student gets its new experts.
        router_rows: the rows of the experts that train do so too.
        open_after: steps after which new experts are open; ``None`` = from the start.
        early: counts at the best evaluation of the domain, not at the last.
    """

    name: str
    experts: str
    taught: bool = True
    mixed: bool = False
    gamma: float = 0.0
    retention: tuple[tuple[str, float], ...] = ()
    router: bool = False
    steering: tuple[tuple[str, float], ...] = ()
    rate: float = 1e-3
    adapters: tuple[dict, ...] = ()
    rows: float | None = None
    embedding: bool = False
    grown: tuple[str, ...] = ()
    router_rows: bool = False
    open_after: int | None = None

    @property
    def early(self) -> bool:
        return not self.taught


HELD = {"mixed": True, "gamma": 10.0}
STEERED = (("coeff", 0.01), ("retention", 1.0))
ARMS = (
    Arm("full, CE", "all", taught=False),
    Arm("full, KD", "all"),
    Arm("full, KD + mixing + gamma", "all", **HELD),
    Arm("chosen experts, CE", "chosen", taught=False),
    Arm("chosen experts, KD", "chosen"),
    Arm("chosen experts, KD + mixing", "chosen", mixed=True),
    Arm(
        "chosen experts, KD + mixing + expert retention",
        "chosen",
        mixed=True,
        retention=(("experts", 3.0),),
    ),
    Arm("chosen experts, KD + mixing + L2", "chosen", mixed=True, retention=(("l2", 0.1),)),
    Arm("chosen experts, KD + mixing + gamma", "chosen", **HELD),
    Arm("... + router", "chosen", router=True, **HELD),
    Arm("... + router + steering", "chosen", router=True, steering=STEERED, **HELD),
    Arm("random experts, KD + mixing + gamma", "random", **HELD),
    Arm("10 of 32 experts, KD + mixing + gamma", "quarter", **HELD),
    Arm("... + three times the learning rate", "quarter", rate=3e-3, **HELD),
)


def adapted(name: str, rank: int, experts: str = "none", **more) -> Arm:
    """An arm with adapters of the usual scale and rate on attention and all experts, or those that
    ``experts`` names."""
    low_rank = {
        "targets": ["experts", "attention"],
        "experts": "all" if experts == "none" else "selected",
        "rank": rank,
    }
    return Arm(name, experts, adapters=(low_rank,), **{**HELD, **more})


ARMS += (
    adapted("adapters of rank 11 + embedding", 11, embedding=True),
    adapted("adapters of rank 6 + 20 % of the rows", 6, rows=0.2),
    adapted("adapters of rank 11", 11),
    adapted("adapters of rank 22 on chosen experts + embedding", 22, "chosen", embedding=True),
)
COPIES = ("--layers", "2-3", "--per-layer", "5", "--rows", "mean")
"""Ten new experts, in the later layers, whose routers tell a domain best."""
DONORS = (*COPIES[:-1], "donor")
FOUR = ("--layers", "2-3", "--per-layer", "2", "--rows", "mean")
LED = (("coeff", 0.03), ("target_mass", 0.5), ("retention", 0.3))
OPENED = {"router_rows": False, "open_after": 75}
BESIDE = {
    "adapters": ({"targets": ["*.mlp.experts.[0-7].*", "attention"], "rank": 11, "lr": 0.75},)
}


def grown(name: str, options: tuple[str, ...] = COPIES, **more) -> Arm:
    """An arm with new experts, at the rate that suits them."""
    usual = {"router_rows": True, "rate": 6e-3, **HELD}
    return Arm(name, "new", grown=options, **{**usual, **more})


ARMS += (
    grown("10 new experts"),
    grown("10 new experts, led by steering", steering=LED),
    grown("10 new experts, led by steering, gamma 30", steering=LED, gamma=30.0),
    grown("10 new experts, led by steering, a door", steering=LED, open_after=50),
    grown(
        "10 new experts that begin as the mean, led by steering",
        (*COPIES, "--weights", "mean"),
        steering=LED,
    ),
    grown("10 new experts in their donors' rows, frozen, a door", DONORS, **OPENED),
    grown("4 new experts, led by steering, + adapters of rank 11", FOUR, steering=LED, **BESIDE),
)
ARMS += (
    Arm(
        "10 of 32 experts, three times the learning rate, gamma 30",
        "quarter",
        mixed=True,
        gamma=30.0,
        rate=3e-3,
    ),
)
BY_NAME = {arm.name: arm for arm in ARMS}
UNTOUCHED = "untouched"
FULL_REFERENCE = "full, KD + mixing + gamma"


def random_experts(seed: int) -> dict[int, list[int]]:
    """As many experts of every layer as are chosen, by the seed alone."""
    draw = random.Random(seed)
    return {layer: sorted(draw.sample(range(EXPERTS), CHOSEN)) for layer in range(LAYERS)}


def experts(arm: Arm, profile: Path, seed: int) -> dict:
    """The domain's ``experts`` in the recipe."""
    if arm.experts in ("all", "none"):
        return {}
    if arm.experts == "random":
        return {"layers": random_experts(seed)}
    if arm.grown:
        return {"new": "all"}
    choice = {"method": "top_n", "n": CHOSEN, "score": "contrast"}
    return {"profile": str(profile), **(QUARTER if arm.experts == "quarter" else choice)}


def train(arm: Arm, domain: str) -> dict:
    """The recipe's ``train``."""
    if arm.experts == "all":
        return dict(EVERYTHING)
    made: dict = {"router": arm.router, "router_rows": arm.router_rows}
    if arm.adapters:
        made["adapters"] = list(arm.adapters)
    if arm.adapters and not arm.grown:
        made["experts"] = "none"
    if arm.rows is not None:
        made["vocabulary_rows"] = {"domain": domain, "budget": arm.rows}
    if arm.embedding:
        made |= {"embedding": True, "output_layer": True}
    return made


def recipe(arm: Arm, domain: str, folder: Path, seed: int) -> dict:
    """The arm's recipe for a domain prepared in ``folder``."""
    data = folder / "data"
    taught = {"teacher": "expert"} if arm.taught else {}
    made: dict = {
        "domains": [
            {
                "name": domain,
                "data": [f"{data}/{domain}_slice", f"{data}/{domain}_held_out"],
                "experts": experts(arm, folder / "profile.json", seed),
                **taught,
            }
        ],
        "general_data": [f"{data}/english_held_out"],
        "objective": {
            "alpha": 1.0 if arm.taught else 0.0,
            "beta": 0.0 if arm.taught else 1.0,
            "general_beta": 1.0 if arm.mixed and not (arm.gamma or arm.retention) else 0.0,
            "gamma": arm.gamma,
        },
        "retention": dict(arm.retention),
        "train": train(arm, domain),
        "evaluation": {},
    }
    if arm.taught:
        made["teachers"] = {"expert": {"source": f"megatron:{folder}/teacher"}}
    if arm.mixed:
        made["general_data"].insert(0, f"{data}/english_slice")
        made["mixing"] = {"general": GENERAL_SHARE}
    if arm.steering:
        made["steering"] = dict(arm.steering)
    if arm.open_after is not None:
        made["routing"] = {"open": {"points": {0: 0.0, arm.open_after: 1.0}}}
    return made


def evaluation_interval(arm: Arm, steps: int) -> int:
    """Steps between evaluations; an arm that counts at its end is measured only there."""
    return max(1, steps // EVALUATIONS) if arm.early else steps


def counted(arm: Arm, losses: list[float]) -> int:
    """Which of a run's evaluations counts: the last, or the best of the domain (the earliest)."""
    return losses.index(min(losses)) if arm.early else len(losses) - 1
