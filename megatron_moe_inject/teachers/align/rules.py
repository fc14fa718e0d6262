"""What a recipe may ask of a teacher with another tokenizer, before anything is read.

It tells how likely it finds the text, and nothing of ids that are not there: what needs more of a
teacher is refused. Nothing here needs torch.
"""

from __future__ import annotations

from argparse import Namespace

from megatron_moe_inject.host.errors import RecipeError, fail, listing
from megatron_moe_inject.recipe.schema import Recipe, TeacherSpec
from megatron_moe_inject.teachers.imitation.section import IMITATION
from megatron_moe_inject.teachers.sources import SOURCES


def aligned_names(recipe: Recipe) -> list[str]:
    """The recipe's teachers whose text is aligned with the student's."""
    return [name for name, spec in recipe.teachers.items() if spec.aligned]


def aligned_domains(recipe: Recipe) -> list[int]:
    """Indices of the domains that such a teacher teaches."""
    names = set(aligned_names(recipe))
    return [i for i, domain in enumerate(recipe.domains) if names & domain.teacher_weights.keys()]


def check_rules(recipe: Recipe) -> None:
    """Refuse what needs more than the probabilities of pieces of text.

    Raises:
        RecipeError: the first setting that does.
    """
    names = aligned_names(recipe)
    for name in names:
        _check_teacher(name, recipe.teachers[name])
    if not names:
        return
    aligned, imitation = f"teacher {names[0]} has align: chunks", recipe[IMITATION]
    for key in imitation.in_use():
        raise fail(
            f"imitation.{key}", getattr(imitation, key),
            f"compares layers token by token, and {aligned}, whose tokens are others",
            "set it to 0, or name a teacher with the student's tokenizer",
        )  # fmt: skip
    if recipe.objective.confidence == "entropy":
        raise fail(
            "objective.confidence", "entropy", f"needs a teacher's whole vocabulary, and {aligned}",
            "write label, the probability of a piece of text, or none",
        )  # fmt: skip
    for i, domain in enumerate(recipe.domains):
        if len(domain.teacher_weights) > 1 and set(names) & domain.teacher_weights.keys():
            raise fail(
                f"domains[{i}].teacher", listing(domain.teacher_weights),
                f"mixes distributions over the student's ids, and {aligned}",
                "name one teacher",
            )  # fmt: skip


def _check_teacher(name: str, spec: TeacherSpec) -> None:
    path = f"teachers.{name}"
    kind = SOURCES[spec.kind]
    if kind.tokenizer is None and kind.aligned is None:
        raise fail(
            f"{path}.align", spec.align,
            f"needs the log-probabilities of a teacher's own tokens, which {spec.source} does not "
            "give",
            "name a teacher of another kind, or remove it",
        )  # fmt: skip
    if spec.tail != type(spec)(spec.source).tail:
        raise fail(
            f"{path}.tail", spec.tail, "is of ids that are not told, and align: chunks asks for "
            "none", "remove it",
        )  # fmt: skip
    if spec.window:
        raise fail(
            f"{path}.window", spec.window, "is of hidden states, of which align: chunks keeps none",
            "remove it",
        )  # fmt: skip
    if spec.layers:
        raise fail(
            f"{path}.layers", dict(spec.layers), "is for imitation; align: chunks compares text",
            "remove it",
        )  # fmt: skip
    if spec.ranks == "pipeline":
        raise fail(
            f"{path}.ranks", spec.ranks, "is not built for align: chunks",
            "write last or auto: the last stage runs it",
        )  # fmt: skip


def check_data(recipe: Recipe, args: Namespace) -> None:
    """Refuse positions that begin anew where attention does not: no text is read so.

    Raises:
        RecipeError: names the flag.
    """
    from megatron_moe_inject.data.packed import packing_flag

    apart = packing_flag(args) is not None or args.reset_attention_mask
    if aligned_names(recipe) and args.reset_position_ids and not apart:
        raise RecipeError(
            "--reset-position-ids: lets positions begin anew at documents that see each other, "
            f"which teacher {aligned_names(recipe)[0]} with align: chunks does not read; add "
            "--reset-attention-mask, or leave it out"
        )
