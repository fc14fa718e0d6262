"""All that the plugin uses of Megatron, and which of it a recipe has in use.

``install`` checks what every run uses; a run checks the rest once its recipe and student are
known, before anything is built.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable

from megatron_moe_inject.adapters.uses import (
    ADAPTERS,
    DOMAIN_ADAPTERS,
    GROUPED_ADAPTERS,
    VOCABULARY_ROWS,
)
from megatron_moe_inject.convert.uses import IMPORT
from megatron_moe_inject.data.uses import HELD_OUT_PAIRS, MIXING, PLACES, PREPARE, VALIDATION_SETS
from megatron_moe_inject.experts.train.uses import FROZEN_FP8, GROUPED, HYBRID_TRAIN, TRAIN
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.contract import Contract, Use, Wrapped, symbols, unmet
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.lane_uses import CPU_LANE
from megatron_moe_inject.host.uses import (
    EVERY_RUN,
    GELU_GATES,
    HYBRID_STUDENT,
    MODEL,
    OWN_ENTRY,
    PLAIN_QUERIES,
    PROJECTION_NORMS,
    ROUTING_WATCH,
)
from megatron_moe_inject.planning.uses import PLANNING
from megatron_moe_inject.preference.uses import PREFERENCE
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.feature import Feature
from megatron_moe_inject.recipe.features import FEATURES
from megatron_moe_inject.recipe.run_kinds import INJECTION
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.recipe.uses import RECIPE
from megatron_moe_inject.retention.uses import EXPERT_RETENTION, L2, ORIGINALS
from megatron_moe_inject.rollouts.uses import READING, WRITING
from megatron_moe_inject.routing.uses import DOOR, ROUTER_ROWS, STEERING
from megatron_moe_inject.teachers.uses import (
    CONVERTER,
    DATA_FILES,
    IMITATION,
    MEGATRON,
    SERVED,
    WRITER,
)

_TRAINING = "megatron.training.training"


def _function(name: str, does: str) -> Wrapped:
    return Wrapped(f"{_TRAINING}.{name}", does=does)


ARGUMENTS = Wrapped("megatron.training.arguments.add_megatron_arguments", does="--inject-* flags")
PRETRAIN = _function("pretrain", "reads the recipe; when all is saved: proofs and files")
SETUP = _function("setup_model_and_optimizer", "freezes before DDP; attaches after loading")
BASE_CHECKPOINT = Wrapped(
    "megatron.training.checkpointing._load_base_checkpoint",
    does="what is asked of the student's checkpoint, and lacks",
)
OPTIMIZER = _function("get_megatron_optimizer", "lets it be saved where little trains")
ITERATORS = _function("build_train_valid_test_data_iterators", "which split each iterator reads")
DATASETS = _function("build_train_valid_test_datasets", "text to measure on; order of the blend")
NUM_SAMPLES = _function("get_train_valid_test_num_samples", "how much text is held out")
LOADER = _function("build_pretraining_data_loader", "held-out text from its beginning")
EVALUATION = _function("evaluate_and_print_results", "what is measured on held-out text")
EVALUATE = _function("evaluate", "our terms in the results")
STEP = _function("train_step", "ends training with a checkpoint where a step cannot be made")
SCHEDULE = _function("get_forward_backward_func", "the step hook")
LOOP = _function("train", "the first evaluation; what must not change is remembered")
LOG = _function("training_log", "our terms in the log")
AROUND = (
    *(NUM_SAMPLES, DATASETS, LOADER, OPTIMIZER),
    *(STEP, EVALUATION, EVALUATE, LOG, BASE_CHECKPOINT),
)
"""What features' parts may stand around (``RunPart.around``), besides ``train`` and
``build_train_valid_test_data_iterators``."""
WIRING = Contract(
    "every run",
    (
        ARGUMENTS,
        PRETRAIN,
        SETUP,
        ITERATORS,
        SCHEDULE,
        LOOP,
        *AROUND,
        *symbols("megatron.training", "pretrain"),
        Use(
            "megatron.core.tensor_parallel.gather_from_sequence_parallel_region",
            ("group", "tensor_parallel_output_grad"),
        ),
    ),
)
"""Functions that ``install`` wraps, and what the loss hook uses."""

ALWAYS = (WIRING, EVERY_RUN, MODEL, RECIPE)


EVERYTHING = (
    *ALWAYS,
    HYBRID_STUDENT,
    *(TRAIN, HYBRID_TRAIN, GROUPED, FROZEN_FP8),
    *(ADAPTERS, GROUPED_ADAPTERS, DOMAIN_ADAPTERS, VOCABULARY_ROWS),
    *(ROUTING_WATCH, STEERING, ROUTER_ROWS, DOOR),
    *(ORIGINALS, EXPERT_RETENTION, L2),
    *(PREFERENCE, HELD_OUT_PAIRS),
    *(DATA_FILES, MEGATRON, IMITATION),
    *(PLACES, WRITER, CONVERTER, SERVED),
    *(MIXING, VALIDATION_SETS),
    *(READING, WRITING),
    PREPARE,
    IMPORT,
    OWN_ENTRY,
    *(PLAIN_QUERIES, PROJECTION_NORMS, GELU_GATES),
    CPU_LANE,
    PLANNING,
)
"""All contracts of the package."""


def in_use(
    recipe: Recipe,
    facts: StudentFacts | None = None,
    args: Namespace | None = None,
    *,
    kind: str = INJECTION,
    features: Iterable[Feature] | None = None,
) -> list[Contract]:
    """What a run uses: what every run does, and what its features say.

    Args:
        recipe: checked.
        facts: the student; ``None`` = any, so that what depends on it counts as used.
        args: Megatron's arguments, where they are known.
        kind: see ``recipe.run_kinds``.
        features: those that may take part; all, unless given.
    """
    parts = list(ALWAYS)
    if facts is None or facts.pattern is not None:
        parts.append(HYBRID_STUDENT)
    for feature in FEATURES if features is None else features:
        if kind in feature.runs:
            parts += [part for part in feature.uses(recipe, facts, args) if part not in parts]
    return parts


def require_always() -> None:
    """Check that this Megatron has what every run uses.

    Raises:
        ImportError: naming everything that it lacks, its version and those supported.
    """
    problem = unmet(ALWAYS, compat.megatron_version(), compat.SUPPORTED)
    if problem is not None:
        raise ImportError(problem)


def require(parts: Iterable[Contract]) -> None:
    """Check that this Megatron has what a run uses (``in_use``). No collective.

    Raises:
        RecipeError: naming everything that it lacks and the parts that need it.
    """
    problem = unmet(parts, compat.megatron_version(), compat.SUPPORTED)
    if problem is not None:
        raise RecipeError(problem)
