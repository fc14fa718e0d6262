"""What a recipe may ask of a server, without asking it. Needs no torch."""

from __future__ import annotations

from megatron_moe_inject.host.errors import NAME, fail
from megatron_moe_inject.recipe.schema import Recipe, TeacherSpec
from megatron_moe_inject.teachers.served.address import (
    Address,
    holds_credentials,
    parse_addresses,
)
from megatron_moe_inject.teachers.store.rules import check_rules, taught_by

KIND = "server"


def served_names(recipe: Recipe) -> list[str]:
    """The recipe's teachers that are servers."""
    return [name for name, spec in recipe.teachers.items() if spec.kind == KIND]


def addresses_of(recipe: Recipe, name: str) -> list[Address]:
    """The servers of a teacher.

    Raises:
        RecipeError: a URL that is none.
    """
    key, source = f"teachers.{name}.source", recipe.teachers[name].source
    if holds_credentials(source):
        raise fail(
            key, "(not shown)", "holds credentials in a URL",
            f"put a key into an environment variable, and its name into teachers.{name}.server."
            "key_from",
        )  # fmt: skip
    return parse_addresses(
        recipe.teachers[name].path, lambda problem, remedy: fail(key, source, problem, remedy)
    )


def check_server(recipe: Recipe, name: str) -> None:
    """Refuse what servers cannot be asked.

    Raises:
        RecipeError: the first setting that they cannot.
    """
    addresses_of(recipe, name)
    if recipe.teachers[name].tail == "sample":
        raise fail(
            f"teachers.{name}.tail", "sample",
            "is of ids that were drawn, and servers give the most likely ones",
            "write bucket or renormalize",
        )  # fmt: skip
    check_rules(recipe, name)
    path, spec = f"teachers.{name}.server", recipe.teachers[name].server
    _check_tokens(path, recipe.teachers[name])
    if recipe.objective.confidence == "entropy":
        raise fail(
            "objective.confidence", "entropy",
            f"needs a teacher's whole vocabulary, and teachers.{name} is a server of some ids",
            "write label, or none",
        )  # fmt: skip
    for key in ("top", "concurrent"):
        if getattr(spec, key) < 1:
            raise fail(f"{path}.{key}", getattr(spec, key), "is not positive", "write 1 or more")
    if spec.ahead < 0:
        raise fail(f"{path}.ahead", spec.ahead, "is negative", "0 asks when a step begins")
    for key in ("timeout", "patience"):
        if not 0 < getattr(spec, key) < 1e6:
            raise fail(f"{path}.{key}", getattr(spec, key), "is no time", "write seconds")
    if spec.key_from is not None and not NAME.fullmatch(spec.key_from):
        raise fail(
            f"{path}.key_from", "(not shown)", "is no name of an environment variable",
            "write the variable's name, not the key",
        )  # fmt: skip


def _check_tokens(path: str, teacher: TeacherSpec) -> None:
    """Keys of a teacher with a tokenizer of its own, and of one without."""
    spec = teacher.server
    if not teacher.aligned:
        if spec.tokenizer is not None:
            raise fail(
                f"{path}.tokenizer", spec.tokenizer,
                "is of a teacher with a tokenizer of its own", "write align: chunks, or remove it",
            )  # fmt: skip
        return
    if spec.tokenizer is None:
        raise fail(
            f"{path}.tokenizer", None, "is missing: align: chunks reads text as the served model's "
            "own ids", "name a folder of this machine with its tokenizer",
        )  # fmt: skip
    if spec.top != type(spec)().top:
        raise fail(
            f"{path}.top", spec.top, "is of the most likely ids, and align: chunks asks for the "
            "text's own alone", "remove it",
        )  # fmt: skip


def ids_asked(teacher: TeacherSpec) -> int:
    """Of the most likely ids of each token how many servers are asked for; 0 for the text alone."""
    return 0 if teacher.aligned else teacher.server.top


def check_temperature(recipe: Recipe, name: str, vocab_size: int | None) -> None:
    """Refuse temperatures at which what a server says cannot be known.

    Servers give log-probabilities at temperature 1. At another the ids' shares among themselves
    follow from these; what all other ids have together does not.

    Args:
        vocab_size: ids of the student; None where that is not known yet.

    Raises:
        RecipeError: names the temperature and what can be done.
    """
    spec = recipe.teachers[name]
    if spec.aligned:  # which divides log-probabilities of chunks by it
        return
    used = {recipe.temperature(domain) for domain in taught_by(recipe, name)}
    if not used:  # the reference of pairs alone, at temperature 1
        return
    key = f"teachers.{name}.temperature"
    if len(used) > 1:
        raise fail(
            key, sorted(used), "are several, and servers are asked at one",
            "give its domains one temperature, or name it twice",
        )  # fmt: skip
    whole = vocab_size is None or spec.server.top >= vocab_size
    if used == {1.0} or spec.tail == "renormalize" or whole:
        return
    raise fail(
        key, used.pop(),
        f"cannot be had from {spec.server.top} ids at temperature 1, which is what servers give: "
        "how much all other ids have at another is not known",
        "write temperature: 1.0, or tail: renormalize, which needs no others",
    )  # fmt: skip
