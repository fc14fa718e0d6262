"""All features, in the order in which they start, attach and take part in a step.

A new feature is one line here; a package of its own adds one as an entry point of the group
``megatron_moe_inject.features`` and a script by ``FEATURES.register``.
"""

from __future__ import annotations

from megatron_moe_inject.host.registry import Registry
from megatron_moe_inject.recipe.feature import Feature
from megatron_moe_inject.recipe.section import Section

FEATURES: Registry[Feature] = Registry(
    "megatron_moe_inject.features",
    {
        "data": "megatron_moe_inject.data.feature:DataFiles",
        "held_out_pairs": "megatron_moe_inject.data.feature:HeldOutPairsOfAnswers",
        "rollouts": "megatron_moe_inject.rollouts.feature:RolloutsFeature",
        "generation": "megatron_moe_inject.rollouts.feature:GenerationFeature",
        "stores": "megatron_moe_inject.teachers.store.feature:StoresFeature",
        "servers": "megatron_moe_inject.teachers.served.feature:ServersFeature",
        "validation_sets": "megatron_moe_inject.data.feature:SeveralValidationSets",
        "beginning": "megatron_moe_inject.recipe.beginning:BeginningFeature",
        "new_experts": "megatron_moe_inject.experts.grow.feature:NewExpertsFeature",
        "door": "megatron_moe_inject.routing.door_feature:DoorFeature",
        "mixing": "megatron_moe_inject.data.feature:Mixing",
        "train": "megatron_moe_inject.experts.train.feature:Freezing",
        "adapters": "megatron_moe_inject.adapters.feature:AdaptersFeature",
        "originals": "megatron_moe_inject.retention.feature:Originals",
        "report": "megatron_moe_inject.evaluation.report.feature:ReportFeature",
        "evaluation": "megatron_moe_inject.evaluation.feature:EvaluationFeature",
        "aligned": "megatron_moe_inject.teachers.align.feature:AlignedFeature",
        "teachers": "megatron_moe_inject.teachers.feature:Teachers",
        "preference": "megatron_moe_inject.preference.feature:PreferenceFeature",
        "objective": "megatron_moe_inject.objective:ObjectiveFeature",
        "imitation": "megatron_moe_inject.teachers.imitation.feature:ImitationFeature",
        "progress": "megatron_moe_inject.recipe.progress:ProgressFeature",
        "profile": "megatron_moe_inject.experts.choose.feature:ProfileFeature",
        "router_rows": "megatron_moe_inject.routing.feature:RouterRowsFeature",
        "steering": "megatron_moe_inject.routing.feature:SteeringFeature",
        "retention": "megatron_moe_inject.retention.feature:RetentionFeature",
        "stages": "megatron_moe_inject.experts.train.feature:ForwardStages",
    },
)
"""What a feature needs of another comes before it."""


def sections() -> dict[str, Section]:
    """The features' sections of a recipe, by key."""
    return {f.section.key: f.section for f in FEATURES if f.section is not None}
