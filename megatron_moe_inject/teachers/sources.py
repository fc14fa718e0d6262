"""Kinds of teachers, by the word that begins a recipe's ``source``.

A new kind is one module and one line here; a package of its own adds one as an entry point of the
group ``megatron_moe_inject.teachers`` and a script by ``SOURCES.register``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.registry import Registry

if TYPE_CHECKING:
    from argparse import Namespace
    from contextlib import AbstractContextManager

    import numpy as np
    import torch.distributed as dist

    from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext
    from megatron_moe_inject.recipe.schema import Recipe, TeacherSpec
    from megatron_moe_inject.teachers.base import Source, Teacher, TeacherInfo
    from megatron_moe_inject.teachers.step_pass import StepTeacher
    from megatron_moe_inject.teachers.vocabulary import TokenizerFlags, Vocabulary


class Folder(Protocol):
    """A folder that a recipe or a flag names."""

    @property
    def path(self) -> Path:
        """Where it is."""
        ...

    def error(self, problem: str, remedy: str) -> RecipeError:
        """The error that names the key and what is written there."""
        ...


class SaysRows(Protocol):
    """Says the rows of a store, see ``store.produce.Producer``."""

    def rows(
        self, tokens: np.ndarray, lengths: Sequence[int], *, data: int = 0, first_token: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows of some documents, in order, and how many ids each has."""
        ...


class ToldForStore(Protocol):
    """A teacher that runs no model here, whose words a store is to keep.

    Attributes:
        architecture: what it is, in a few words.
        told: one line about it.
    """

    architecture: str
    told: str

    def check(self, plan: Any) -> None:
        """Refuse what it cannot say of a ``store.manifest.StorePlan``, with a ``RecipeError``."""
        ...

    def writing(self, plan: Any) -> AbstractContextManager[SaysRows]:
        """What says the rows, as long as it is open."""
        ...


@dataclass(frozen=True)
class OwnTokens:
    """How a kind that runs no model says how likely texts of its own tokens are, which is what
    ``TeacherSpec.align`` asks of a teacher.

    Attributes:
        check: of a teacher's name, its spec and the student's tokenizer flags: what can be known
            before a run; as ``Alignment.check``.
        in_step: as ``Alignment.in_step``.
        for_store: if ``moe-inject store-teacher`` can write that: of recipe, teacher, flags and the
            longest text.
    """

    check: Callable[[str, TeacherSpec, TokenizerFlags], TeacherInfo]
    in_step: Callable[
        [RunContext, TeacherInfo, BuiltStudent, dist.ProcessGroup | None], StepTeacher
    ]
    for_store: Callable[[Recipe, str, Namespace, int], ToldForStore] | None = None


@dataclass(frozen=True)
class SourceKind:
    """How teachers of one kind are found and loaded.

    Attributes:
        example: what a source of this kind looks like.
        check: of source, student's vocabulary and prefix: what can be known without loading; see
            ``loading.check_teacher``.
        load: of the source, and by name ``params_dtype``, ``device``, ``resets_documents`` and
            ``fp8``: a whole teacher on this rank; see ``loading.load_teacher``.
        is_folder: what stands behind the colon is a directory of this machine.
        folder: which one is read of the one that is named; ``None`` = itself.
        files: what is read of it, for ``--inject-verify-inputs``; ``None`` = all in it.
        takes_fp8: ``TeacherSpec.fp8`` may be more than ``none``.
        takes_ep: ``TeacherSpec.ep`` may be more than 1; ``load`` then gets the ranks, ``experts``.
        for_store: of such a kind, if ``moe-inject store-teacher`` can write what it says: of
            recipe, teacher, flags, ids of each token, the longest text and ids of the student.
        in_step: of a kind that runs no model, and has no ``load``: makes what teaches in a step, on
            a rank of the last stage, of the run, what ``check`` gave, and the built student; no
            collective.
        tokenizer: of the source, the folder or file of its tokenizer, None where there is none; of
            a kind whose models ``TeacherSpec.align`` can ask.
        aligned: of a kind that runs no model, how ``TeacherSpec.align`` asks it.
    """

    example: str
    check: Callable[[Source, Vocabulary, str | Sequence[int]], TeacherInfo]
    load: Callable[..., Teacher] | None = None
    is_folder: bool = True
    folder: Callable[[Folder], Path] | None = None
    files: Callable[[Folder], Sequence[Path]] | None = None
    takes_fp8: bool = False
    takes_ep: bool = False
    tokenizer: Callable[[Source], Path | None] | None = None
    in_step: Callable[[RunContext, TeacherInfo, BuiltStudent], StepTeacher] | None = None
    for_store: Callable[[Recipe, str, Namespace, int, int, int], ToldForStore] | None = None
    aligned: OwnTokens | None = None


SOURCES: Registry[SourceKind] = Registry(
    "megatron_moe_inject.teachers",
    {
        "megatron": "megatron_moe_inject.teachers.megatron:source_kind",
        "hf": "megatron_moe_inject.teachers.huggingface:source_kind",
        "store": "megatron_moe_inject.teachers.store.kind:source_kind",
        "server": "megatron_moe_inject.teachers.served.kind:source_kind",
    },
)


@dataclass(frozen=True)
class Alignment:
    """How a teacher with a tokenizer of its own is compared with the student.

    Attributes:
        check: of its name, its spec and the student's tokenizer flags: as
            ``loading.check_teacher``.
        in_step: makes what teaches in a step, on a rank of the last stage, of the run, what
            ``check`` gave, the built student, and the tensor-parallel ranks over gloo (None for one
            alone); no collective, but those of ``load_teacher`` for a teacher with ``ep``.
    """

    check: Callable[[str, TeacherSpec, TokenizerFlags], TeacherInfo]
    in_step: Callable[
        [RunContext, TeacherInfo, BuiltStudent, dist.ProcessGroup | None], StepTeacher
    ]


ALIGNMENTS: Registry[Alignment] = Registry(
    "megatron_moe_inject.alignments",
    {"chunks": "megatron_moe_inject.teachers.align.start:alignment"},
)
"""By the words of ``TeacherSpec.align`` but ``none``."""

EXAMPLES = {"server": "server:http://host:8000"}
"""Of kinds that name no folder, for whoever has not imported them."""


def examples() -> str:
    """What a source may look like, nothing imported, as in ``megatron:/dir or hf:/dir``."""
    kinds = {name: SOURCES.loaded(name) for name in SOURCES.names()}
    return " or ".join(
        EXAMPLES.get(name, f"{name}:/dir") if kind is None else kind.example
        for name, kind in kinds.items()
    )


def parse_source(name: str, text: str) -> Source:
    """Split ``kind:/dir``.

    Args:
        name: of the teacher in the recipe.

    Raises:
        RecipeError: another kind, or no existing directory behind one that needs it.
    """
    from megatron_moe_inject.teachers.base import Source

    kind, colon, path = text.partition(":")
    source = Source(name, text, kind, Path(path.strip()).expanduser())
    if kind not in SOURCES or not colon or not path.strip():
        raise source.error("is no teacher source", f"write {examples()}")
    if SOURCES[kind].is_folder and not source.path.is_dir():
        raise source.error("is no directory on this machine", "name an existing directory")
    return source
