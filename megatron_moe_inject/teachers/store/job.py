"""What ``moe-inject store-teacher`` writes, from a recipe, Megatron's flags and its own options.

The recipe says which teacher teaches which domains, the flags where their data is and which
tokenizer made it. There is no student: nothing else of a training command is needed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import os
import shutil
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from megatron_moe_inject.host.errors import RecipeError, fail, listing, suggest
from megatron_moe_inject.host.version import VERSION
from megatron_moe_inject.recipe.entries import SPLITS, data_paths, split_labels
from megatron_moe_inject.recipe.facts import StudentFacts
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.teachers.align.scores import ModelScores
from megatron_moe_inject.teachers.base import Teacher, TeacherInfo
from megatron_moe_inject.teachers.fit import check_fit, excluded_ids
from megatron_moe_inject.teachers.loading import (
    StudentTokenizer,
    check_teacher,
    load_teacher,
    states_dtype,
)
from megatron_moe_inject.teachers.sources import (
    ALIGNMENTS,
    SOURCES,
    SaysRows,
    ToldForStore,
    parse_source,
)
from megatron_moe_inject.teachers.store.chunk_plan import WrittenChunks, written_chunks
from megatron_moe_inject.teachers.store.chunk_rows import ChunkProducer
from megatron_moe_inject.teachers.store.kept import (
    TOP,
    Choices,
    check_no_ids,
    kept_chunks,
    kept_tokens,
    tokenizer_digests,
    tokenizer_file,
)
from megatron_moe_inject.teachers.store.manifest import (
    TOKENIZER,
    StoredData,
    StoredTeacher,
    StorePlan,
    sample_sha256,
)
from megatron_moe_inject.teachers.store.produce import Producer
from megatron_moe_inject.teachers.store.rules import taught_by
from megatron_moe_inject.teachers.store.writer import Piece, file_sha256, pieces

_SEED = 1234


@dataclass(frozen=True)
class TextFiles:
    """A data set that is read.

    Attributes:
        path: prefix of its ``.bin`` and ``.idx``.
        lengths: tokens of each document.
        starts: first token of each, in the ``.bin`` file.
        dtype: of its ids.
    """

    path: str
    lengths: np.ndarray
    starts: np.ndarray
    dtype: np.dtype

    @classmethod
    def open(cls, path: str) -> TextFiles:
        """Read its index.

        Raises:
            RecipeError: it is no data set of Megatron's, or one that was put together otherwise.
        """
        from megatron.core.datasets.indexed_dataset import IndexedDataset

        try:
            index = IndexedDataset(path, mmap=True).index
        except (OSError, AssertionError, ValueError) as error:
            raise fail(
                "--data-path", path, f"is no data set of Megatron's ({type(error).__name__})",
                "name a prefix of .bin and .idx files",
            ) from None  # fmt: skip
        lengths = np.array(index.sequence_lengths, np.int64)
        starts = np.array(index.sequence_pointers, np.int64) // index.dtype_size
        if not np.array_equal(starts, np.cumsum(lengths) - lengths):
            raise fail(
                "--data-path", path, "has documents that do not follow each other in its .bin file",
                "write it by moe-inject prepare-data or Megatron's preprocess_data.py",
            )  # fmt: skip
        return cls(path, lengths, starts, np.dtype(index.dtype))

    def at(self, places: np.ndarray) -> np.ndarray:
        """Ids of some tokens of the ``.bin`` file."""
        return np.memmap(f"{self.path}.bin", self.dtype, "r")[places].astype(np.int64)

    def tokens(self, piece: Piece) -> np.ndarray:
        """Ids of a shard's documents, one after the other."""
        count = int(piece.lengths.sum())
        with open(f"{self.path}.bin", "rb") as file:
            file.seek(piece.first_token * self.dtype.itemsize)
            return np.fromfile(file, self.dtype, count).astype(np.int64)


class StoreJob:
    """A store to be written: its plan, its text, and its teacher when it is loaded.

    Args:
        recipe: as for training, with the model, or its servers, as the teacher's source.
        args: Megatron's flags, parsed and not validated.
        choices: the options.

    Raises:
        RecipeError: whatever does not fit.
    """

    def __init__(self, recipe: Recipe, args: Namespace, choices: Choices) -> None:
        self._recipe, self._args, self.choices = recipe, args, choices
        self.name = _teacher_name(recipe, choices)
        self._spec = recipe.teachers[self.name]
        spec = self._spec
        kind = SOURCES[spec.kind]
        chunks = None if kind.aligned is None else kind.aligned.for_store
        if kind.load is None and (chunks if spec.aligned else kind.for_store) is None:
            raise fail(
                f"teachers.{self.name}.source", self._spec.source, "runs no model",
                "name the model that a store is to be written of",
            )  # fmt: skip
        tokenizer = StudentTokenizer.from_args(args)
        self._tokenizer_files = tokenizer.files()
        length: int | None = getattr(args, "seq_length", None)
        context: int | None = None
        self.written: WrittenChunks | None = None
        if spec.aligned:
            check_no_ids(self.name, choices)
            self.info = ALIGNMENTS[spec.align].check(self.name, spec, tokenizer)
            self.written = written_chunks(
                self.name, spec, self.info, tokenizer,
                context=choices.context, log_probs=choices.log_probs, length=length,
            )  # fmt: skip
            context = self.written.context
        else:
            self.info = check_teacher(
                self.name, spec.source, student_tokenizer=tokenizer, prefix=spec.prefix
            )
            context = choices.context or length
        if context is None:
            raise RecipeError("--context: missing; say how many tokens the teacher reads at once")
        overlap = context // 4 if choices.overlap is None else choices.overlap
        if not 0 <= overlap < context:
            raise fail("--overlap", overlap, f"is not in [0, {context})", "read some new tokens")
        check_fit(dataclasses.replace(recipe, objective=type(recipe.objective)()),
                  {self.name: self.info}, context)  # fmt: skip
        self.texts = [TextFiles.open(path) for path in _paths(recipe, args, self.name)]
        size = tokenizer.vocabulary().size or self.info.vocab_size
        self._excluded: list[int] = []
        if not spec.aligned:
            self._excluded = sorted(
                {i for i in excluded_ids(self.info) if i < size}
                | set(range(self.info.vocab_size, size))
            )
        if self.written is None:
            kept = kept_tokens(
                recipe, self.name, choices, vocab_size=size, excluded=self._excluded,
                states=(self.info.hidden_size, _name(self.dtype)),
            )  # fmt: skip
        else:
            kept = kept_chunks(self.written, choices, size)
        self.told: ToldForStore | None = None
        if spec.aligned and chunks is not None:
            self.told = chunks(recipe, self.name, args, context)
        elif kind.for_store is not None:
            top = choices.top or TOP
            self.told = kind.for_store(recipe, self.name, args, top, context + 1, size)
            # Of what a server says, ids that the student lacks are left out: rows differ in length.
            kept["mass"] = 1.0 if choices.mass is None else choices.mass
        self.plan = StorePlan(
            teacher=self._described(),
            tokenizer=tokenizer_digests(self._tokenizer_files, choices.failure),
            vocab_size=size,
            context=context,
            overlap=overlap,
            shard_tokens=choices.shard_tokens or 1 << (17 if "states" in kept else 20),
            data=[stored_data(text, choices) for text in self.texts],
            versions=_versions(),
            **kept,
        )
        if self.told is not None:
            self.told.check(self.plan)

    @property
    def dtype(self) -> torch.dtype:
        """Of the teacher's parameters."""
        args = self._args
        params = torch.bfloat16 if getattr(args, "bf16", False) else torch.float32
        params = torch.float16 if getattr(args, "fp16", False) else params
        return states_dtype(self._spec.dtype, params)

    @property
    def remarks(self) -> list[str]:
        """What of the recipe is of training alone."""
        if self._spec.ep == 1 or self.info.experts is None:
            return []
        return [
            f"teachers.{self.name}.ep: {self._spec.ep} is of training; here each process holds all "
            f"{self.info.experts.number} experts of a layer"
        ]

    def _described(self) -> StoredTeacher:
        source = parse_source(self.name, self._spec.source)
        if self.told is not None:
            prefix = list(self.info.prefix)
            return StoredTeacher(source.text, self.told.architecture, 0, {}, "as served", prefix)
        kind = SOURCES[self._spec.kind]
        folder = source.path if kind.folder is None else kind.folder(source)
        files = (
            sorted(path for path in folder.rglob("*") if path.is_file())
            if kind.files is None
            else sorted(kind.files(source))
        )
        return StoredTeacher(
            self._spec.source,
            self.info.architecture,
            self.info.parameters,
            {str(f.relative_to(folder)): file_sha256(f, source.error) for f in files},
            _name(self.dtype) + ("" if self._spec.fp8 == "none" else f", fp8 {self._spec.fp8}"),
            list(self.info.prefix),
        )

    def pieces(self) -> list[Piece]:
        """The shards."""
        lengths = [text.lengths for text in self.texts]
        return list(pieces(self.plan, lengths, [text.starts for text in self.texts]))

    def tokens(self, piece: Piece) -> np.ndarray:
        """Ids of a shard's documents.

        Raises:
            RecipeError: one that the teacher does not have.
        """
        text = self.texts[piece.data]
        tokens = text.tokens(piece)
        unknown = np.isin(tokens, self._excluded) if self._excluded else tokens < 0
        strange = np.flatnonzero(unknown | (tokens >= self.plan.vocab_size) | (tokens < 0))
        if len(strange):
            raise fail(
                "--data-path", text.path,
                f"holds id {tokens[strange[0]]} at token {piece.first_token + strange[0]:,}, which "
                f"the teacher does not have ({self.plan.vocab_size} ids)",
                "leave such documents out, or use a teacher with the data's tokenizer",
            )  # fmt: skip
        return tokens

    def bin_sha256(self) -> list[str]:
        """Checksums of the data's ``.bin`` files."""
        failure = self.choices.failure
        return [file_sha256(Path(f"{text.path}.bin"), failure) for text in self.texts]

    def copy_tokenizer(self) -> None:
        """Put the tokenizer's files into the store."""
        if self.plan.tokenizer:
            assert self._tokenizer_files is not None, "it was digested"
            copy_tokenizer(self._tokenizer_files, self.plan.tokenizer, self.choices.output)

    def producer(
        self, teacher: Teacher, device: torch.device, pass_tokens: int | None = None
    ) -> Producer | ChunkProducer:
        """What runs the loaded teacher over documents.

        Args:
            pass_tokens: of one forward pass, if not as chosen.
        """
        size = pass_tokens or self.choices.pass_tokens
        if self.written is not None:
            scores = ModelScores(teacher, None, device)
            return ChunkProducer(self.written.reader, scores, self.plan, size)
        transform = teacher.logit_transform
        if self._excluded:
            columns = torch.tensor(self._excluded, device=device)
            transform = dataclasses.replace(transform, excluded=columns)
        return Producer(teacher, self.plan, transform, device, size)

    @contextlib.contextmanager
    def writing(self, device: Callable[[], torch.device]) -> Iterator[SaysRows]:
        """What says the rows of documents: the loaded teacher, or one that runs elsewhere.

        Args:
            device: where a model is loaded.

        Raises:
            RecipeError: it cannot be loaded.
        """
        if self.told is not None:
            with self.told.writing(self.plan) as rows:
                yield rows
            return
        where = device()
        with self.teacher(where) as teacher, torch.no_grad():
            yield self.producer(teacher, where)

    @contextlib.contextmanager
    def teacher(self, device: torch.device) -> Iterator[Teacher]:
        """The teacher, loaded, in a world of this process alone.

        Raises:
            RecipeError: it cannot be loaded.
        """
        with _world_of_one() if self._spec.kind == "megatron" else contextlib.nullcontext():
            yield load_teacher(
                self.name,
                self._spec.source,
                params_dtype=self.dtype,
                device=device,
                fp8=self._spec.fp8,
                prefix=() if self._spec.aligned else self.info.prefix,
            )


def _teacher_name(recipe: Recipe, choices: Choices) -> str:
    if choices.teacher is None:
        if len(recipe.teachers) != 1:
            raise RecipeError(
                f"--teacher: missing; the recipe has {listing(recipe.teachers) or 'none'}; name one"
            )
        return next(iter(recipe.teachers))
    if choices.teacher not in recipe.teachers:
        remedy = suggest(choices.teacher, recipe.teachers, "teachers")
        raise fail("--teacher", choices.teacher, "is not in 'teachers'", remedy)
    return choices.teacher


def _paths(recipe: Recipe, args: Namespace, name: str) -> list[str]:
    """The data of the teacher's domains, each file once, in the order of the blends."""
    facts = StudentFacts(0, data_paths=data_paths(args))
    own = {recipe.domains.index(domain) for domain in taught_by(recipe, name)}
    paths: dict[str, None] = {}
    for split in (split for split in SPLITS if split in facts.data_paths):
        labels = split_labels(recipe, facts, split)
        for entry, label in zip(facts.data_paths[split], labels, strict=True):
            if label in own:
                paths[os.path.normpath(entry)] = None
    return list(paths)


def stored_data(text: TextFiles, choices: Choices) -> StoredData:
    """What the manifest says of a data set."""
    count = len(text.lengths)
    first, last = choices.documents or (0, count)
    if not 0 <= first < last <= count:
        raise fail(
            "--documents", f"{first}:{last}", f"are not among the {count} of {text.path}",
            f"name some of 0:{count}",
        )  # fmt: skip
    return StoredData(
        os.path.basename(text.path),
        file_sha256(Path(f"{text.path}.idx"), choices.failure),
        os.stat(f"{text.path}.bin").st_size,
        sample_sha256(Path(f"{text.path}.bin"), choices.failure),
        count,
        int(text.lengths.sum()),
        first,
        last,
    )


def _name(dtype: torch.dtype) -> str:
    return f"{dtype}".removeprefix("torch.")


def copy_tokenizer(files: Path, names: Iterable[str], output: Path) -> None:
    """Put files of a tokenizer, a folder or the only one, into a store."""
    folder = output / TOKENIZER
    folder.mkdir(exist_ok=True)
    for name in names:
        shutil.copyfile(tokenizer_file(files, name), folder / name)


def _versions() -> dict[str, str]:
    found = {"megatron_moe_inject": VERSION}
    for package in ("torch", "megatron-core", "transformers", "transformer_engine"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    return found


@contextlib.contextmanager
def _world_of_one() -> Iterator[None]:
    """Inside, Megatron has process groups of this process alone."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel_state.initialize_model_parallel()
        model_parallel_cuda_manual_seed(_SEED)
        yield
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


__all__ = ["StoreJob", "TeacherInfo"]
