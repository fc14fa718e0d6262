"""Features of the covering array: what each adds to a recipe and to the flags."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Feature:
    """Something that a recipe or a flag switches on.

    Attributes:
        of: the package's feature (``recipe.features``) that it is of.
        recipe: fields of the recipe by dotted path; ``{llama}``, ``{store}`` and ``{experts}`` in
            texts are folders.
        flags: of the run; ``{folder}`` is a folder of its own, ``{tokenizer}`` that of the ids as
            characters.
        terms: what the log then has, above 0 in the end.
    """

    of: str
    recipe: Mapping[str, Any] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    terms: tuple[str, ...] = ()


HYBRID = "hybrid model"
EVERYTHING = "everything trains"
ALIGNED = "aligned teacher"
WITH_EXPERTS = "teacher with experts"
SHARED_EXPERTS = ("--moe-shared-expert-intermediate-size", "64")
FEATURES = {
    "distillation": Feature(
        "objective",
        {"objective.alpha": {"points": {1: 0.4, 3: 0.8}}},
        terms=("kd loss", "kd loss/code"),
    ),
    "temperature": Feature("objective", {"objective.temperature": 2.0}),
    "divergence": Feature("objective", {"objective.divergence": "jsd", "objective.jsd_beta": 0.3}),
    "weighted tokens": Feature(
        "objective",
        {"objective.confidence": "label", "objective.skip_worse": True},
        terms=("kd factor",),
    ),
    "scheduled weight": Feature("objective", {"objective.beta": {"points": {0: 0.1, 4: 0.5}}}),
    "committee": Feature("teachers", {"domains.0.committee": "label"}),
    "hugging face teacher": Feature("teachers", {"teachers.second.source": "hf:{llama}"}),
    # A third of the committee.
    "store of states": Feature("stores", {"teachers.third.source": "store:{store}"}),
    "window": Feature("teachers", {"teachers.coder.window": 1, "teachers.second.window": 2}),
    # Of some samples of the domain, the last ones too; the others read its fixed text.
    "rollouts": Feature(
        "rollouts",
        {"domains.0.data": [1, "rollouts:{rollouts}"], "rollouts.every": 2},
        # Samples have other numbers of tokens that count: means of micro-batches differ by split.
        flags=("--calculate-per-token-loss",),
        terms=("rollout share/code", "rollout age/code", "rollout lm loss/code"),
    ),
    # Of a committee one teacher runs on all stages, the other on the last one alone.
    "teacher on all stages": Feature("teachers", {"teachers.coder.ranks": "pipeline"}),
    "teacher on the last stage": Feature("teachers", {"teachers.second.ranks": "last"}),
    # Of a domain of its own, prose; the student's ids are then characters.
    ALIGNED: Feature(
        "aligned",
        {"teachers.other.align": "chunks"},
        flags=("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "{tokenizer}"),
        terms=("aligned share", "kd loss/prose"),
    ),
    # Where a stage has several ranks, its experts lie on them.
    WITH_EXPERTS: Feature("teachers", {"teachers.coder.source": "megatron:{experts}"}),
    EVERYTHING: Feature("train", {"train.everything": True}),
    "trained router": Feature("train", {"train.router": True}),
    "trained rows": Feature("router_rows", {"train.router_rows": True}),
    "trained head": Feature("train", {"train.output_layer": True, "train.embedding": True}),
    "trained attention": Feature("train", {"train.attention": True, "train.norms": True}),
    "trained shared experts": Feature(
        "train", {"train.shared_experts": True}, flags=SHARED_EXPERTS
    ),
    "pattern": Feature("train", {"train.patterns": ["*.1.pre_mlp_layernorm.weight"]}),
    # On experts that no set with them has chosen, beside those that train whole: of all tokens,
    # and of the domain alone.
    "adapters": Feature(
        "adapters",
        {
            "train.adapters": [
                {"targets": [f"*.mlp.experts.1.{name}.*"], "rank": 4, "alpha": 2, "lr": 1, **more}
                for name, more in (("linear_fc1", {"lr_b": 2}), ("linear_fc2", {"by": "domain"}))
            ]
        },
    ),
    "frozen experts in fp8": Feature(
        "train", {"train.frozen_experts": "fp8"}, flags=("--moe-grouped-gemm",)
    ),
    "gamma": Feature(
        "objective",
        {"objective.gamma": {"points": {1: 0.5, 4: 2.0}}},
        terms=("retention loss",),
    ),
    "expert retention": Feature(
        "retention", {"retention.experts": 2.0}, terms=("expert retention",)
    ),
    "l2": Feature("retention", {"retention.l2": 0.05}, terms=("l2 to start",)),
    "originals on the host": Feature("originals", {"retention.originals": "host"}),
    "imitated states": Feature(
        "imitation",
        {"imitation.hidden": {"points": {0: 0.2, 4: 0.6}}},
        terms=("imitation loss",),
    ),
    "imitated experts": Feature(
        "imitation", {"imitation.experts": 0.25}, terms=("expert imitation loss",)
    ),
    "steering": Feature(
        "steering",
        {"steering.coeff": 0.5, "steering.target_mass": 0.8, "steering.balance": 0.1},
        terms=("steering loss", "target balance loss", "target share/code", "target mass/code"),
    ),
    "steering by confidence": Feature("steering", {"steering.confidence": "label"}),
    "router retention": Feature(
        "steering", {"steering.retention": 1.0}, terms=("router retention",)
    ),
    "scheduled shares": Feature(
        "mixing", {"mixing.general": {"points": {0: 0.75, 3: 0.375}}}, terms=("data share/general",)
    ),
    "preference": Feature(
        "preference",
        {
            "objective.preference.data": [2],
            "objective.preference.beta": 0.5,
            "objective.preference.reference": "original",
            "objective.preference.coeff": {"points": {0: 0.5, 4: 1.0}},
            "mixing.preference": 0.25,
        },
        terms=("preference loss",),
    ),
    "evaluation": Feature(
        "evaluation",
        {"evaluation.gate": False, "evaluation.file": "{folder}/evaluation.jsonl"},
        flags=("--eval-iters", "1", "--eval-interval", "2"),
    ),
    "profile": Feature("profile", flags=("--inject-profile", "{folder}/profile.json")),
    # A run on one process, which others are compared with, is of a GPT model all the same.
    HYBRID: Feature("train", {"layer_numbers": "gpt"}),
}
