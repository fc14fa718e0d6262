"""Which checkpoint Megatron will load, and what it says about the run that wrote it.

Megatron decides when it loads, after everything is built; the plugin has to know before. So this
module asks Megatron's own functions, in the order in which Megatron asks them: ``--load`` or else
``--pretrained-checkpoint``, a non-persistent checkpoint where it is as new, ``--ckpt-step``, the
tracker file, and the format of the folder that is found, whatever ``--ckpt-format`` says. What
Megatron would answer with a silent exit, a traceback or random weights is one error here.

Trust: Megatron's own readers read it, with Megatron's own rules for pickles.
"""

from __future__ import annotations

import hashlib
import os
from argparse import Namespace
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from megatron_moe_inject.host.agreement import agree
from megatron_moe_inject.host.errors import (
    RecipeError,
    fail,
    one_line,
)
from megatron_moe_inject.host.torch_dist import is_training_state, read_metadata, stored_shapes

FORMATS = ("torch_dist", "torch")
"""Formats that a student can be loaded from."""
_BLOCK = 1 << 24
_READERS = 8


class Part(NamedTuple):
    """A range of bytes in a file."""

    name: str
    path: Path
    offset: int
    length: int

    def digest(self) -> bytes:
        """Their SHA-256."""
        hasher, rest = hashlib.sha256(), self.length
        with self.path.open("rb") as file:
            file.seek(self.offset)
            while rest:
                block = file.read(min(rest, _BLOCK))
                if not block:
                    raise EOFError(f"{self.path} ends {rest} bytes too early")
                hasher.update(block)
                rest -= len(block)
        return hasher.digest()


@dataclass(frozen=True)
class StoredCheckpoint:
    """A checkpoint that Megatron is about to load.

    Attributes:
        flag: what names it, ``--load`` or ``--pretrained-checkpoint``.
        root: the folder that the flag names, or the one of non-persistent checkpoints in use.
        folder: the iteration's folder.
        iteration: of the run that wrote it; ``None`` of a release.
        format: one of ``FORMATS`` where it is to be loaded.
        resumes: whether that run goes on, rather than its weights being taken alone.
    """

    flag: str
    root: Path
    folder: Path
    iteration: int | None
    format: str
    resumes: bool

    def argument(self, name: str) -> Any:
        """An argument of the run that wrote the checkpoint, ``None`` where it had none. No
        collective.

        Raises:
            RecipeError: the checkpoint cannot be read.
        """
        return getattr(self.arguments(), name, None)

    def arguments(self) -> Namespace | None:
        """All arguments of that run. No collective.

        Raises:
            RecipeError: the checkpoint cannot be read.
        """
        return self._common().get("args")

    def shapes(self, part: str) -> dict[str, tuple[int, ...]]:
        """Shapes of the model's tensors with ``part`` in their names. No collective.

        The plugin adds tensors of its own to ``torch_dist`` checkpoints alone; of the other format
        the answer is empty.

        Raises:
            RecipeError: the checkpoint cannot be read.
        """
        if self.format != "torch_dist":
            return {}
        try:
            return stored_shapes(self.folder, part)
        except Exception as error:  # a pickle, in which anything can be wrong
            raise self.damaged(error) from error

    def names(self) -> dict[str, tuple[int, ...] | None]:
        """Everything that a ``torch_dist`` checkpoint holds in parts: shapes of tensors by name,
        ``None`` of other objects. No collective.

        Raises:
            RecipeError: the checkpoint cannot be read.
        """
        try:
            stored = read_metadata(self.folder).state_dict_metadata
        except Exception as error:  # a pickle, in which anything can be wrong
            raise self.damaged(error) from error
        return {
            name.partition("/shard_")[0]: tuple(value.size) if hasattr(value, "size") else None
            for name, value in stored.items()
        }

    def parts(self) -> list[Part]:
        """The stored bytes of the model; of the old format whole files. No collective.

        Raises:
            RecipeError: the checkpoint cannot be read.
        """
        try:
            if self.format != "torch_dist":
                files = sorted(self.folder.glob("mp_rank_*/model_optim_rng.pt"))
                return [Part(file.parent.name, file, 0, file.stat().st_size) for file in files]
            stored = read_metadata(self.folder)
            parts = [
                Part(
                    part_name(index),
                    self.folder / info.relative_path,
                    info.offset,
                    info.length,
                )
                for index, info in stored.storage_data.items()
                if isinstance(stored.state_dict_metadata[index.fqn], TensorStorageMetadata)
                and not is_training_state(index.fqn)
            ]
        except Exception as error:  # a pickle, in which anything can be wrong
            raise self.damaged(error) from error
        return sorted(parts, key=lambda part: (part.path, part.offset))

    def damaged(self, error: BaseException) -> RecipeError:
        """The error that says why it cannot be read."""
        reason = one_line(f"{type(error).__name__}: {error}", 200)
        return self.error(
            f"cannot be read ({reason})",
            "copy the checkpoint again, or name another iteration by --ckpt-step",
        )

    def error(self, problem: str, remedy: str) -> RecipeError:
        """The error "flag folder problem; remedy"."""
        return _wrong(self.flag, self.folder, problem, remedy)

    def _common(self) -> dict[str, Any]:
        """What Megatron stored once for all ranks."""
        from megatron.core import dist_checkpointing
        from megatron.training import checkpointing

        try:
            if self.format == "torch_dist":
                return dist_checkpointing.load_common_state_dict(str(self.folder))
            named = self.iteration or 0, self.iteration is None
            path = checkpointing.find_checkpoint_rank_0(str(self.root), *named)
            # Mapped, so that weights and optimizer state in the same file are not read.
            return torch.load(path, map_location="cpu", mmap=True)
        except Exception as error:  # a pickle, in which anything can be wrong
            raise self.damaged(error) from error


def checkpoint_to_load(args: Namespace) -> StoredCheckpoint | None:
    """The checkpoint that Megatron will load with these arguments, ``None`` where it will begin
    with random weights. No collective.

    Raises:
        RecipeError: a folder that Megatron cannot load, or a kind of checkpoint that cannot be
            looked into before everything is built.
    """
    from megatron.training import checkpointing

    if getattr(args, "non_persistent_ckpt_type", None) == "local":
        raise fail(
            "--non-persistent-ckpt-type", "local",
            "keeps checkpoints that only Megatron's running job can read, so what an injection "
            "stores in them cannot be checked before it goes on", "use global, or none",
        )  # fmt: skip
    flag, root = "--load", args.load
    pretrained = getattr(args, "pretrained_checkpoint", None)
    if pretrained is not None and not checkpointing.checkpoint_exists(root):
        flag, root = "--pretrained-checkpoint", pretrained
        if not checkpointing.checkpoint_exists(root):
            raise _wrong(
                flag,
                root,
                f"holds no checkpoint, and neither does --load {args.load}",
                "name a folder that has latest_checkpointed_iteration.txt",
            )
    if root is None:
        return None
    root, iteration, release = _newest(args, flag, root)
    if iteration < 0:
        return None
    folder = checkpointing.get_checkpoint_name(root, iteration, release, return_base_dir=True)
    return StoredCheckpoint(
        flag,
        Path(root),
        Path(folder),
        None if release else iteration,
        _format(args, flag, folder),
        resumes=not (args.finetune or release or flag == "--pretrained-checkpoint"),
    )


def newest_saved(args: Namespace) -> StoredCheckpoint | None:
    """The newest checkpoint in ``--save``, as its tracker file says; ``None`` without one. No
    collective.

    Raises:
        RecipeError: the tracker file cannot be read.
    """
    from megatron.training import checkpointing

    iteration, release = _tracked("--save", args.save)
    if iteration < 0:
        return None
    folder = checkpointing.get_checkpoint_name(args.save, iteration, release, return_base_dir=True)
    try:
        ckpt_format = checkpointing._get_checkpoint_format(folder, args)
    except (OSError, ValueError, NotImplementedError):  # not there, or nothing that can be loaded
        return None
    return StoredCheckpoint(
        "--save",
        Path(args.save),
        Path(folder),
        None if release else iteration,
        ckpt_format,
        resumes=False,
    )


def model_checksum(checkpoint: StoredCheckpoint) -> str:
    """SHA-256 over the stored bytes of a checkpoint's model, the same whatever ranks read them.

    Each rank reads an even share of them, several parts at a time.

    Collectives over the whole world: those of ``agree``, one gather of a checksum for each part on
    the first rank, and one broadcast of the result.

    Raises:
        RecipeError: on every rank, if a file cannot be read.
    """
    rank, world = dist.get_rank(), dist.get_world_size()

    def read() -> list[tuple[str, bytes]]:
        parts = checkpoint.parts()
        total, before, share = max(1, sum(part.length for part in parts)), 0, []
        for part in parts:
            share += [part] if before * world // total == rank else []
            before += part.length
        try:
            with ThreadPoolExecutor(_READERS) as pool:
                return [
                    (p.name, d) for p, d in zip(share, pool.map(Part.digest, share), strict=True)
                ]
        except (OSError, EOFError) as error:
            raise checkpoint.damaged(error) from error

    ranks: list[Any] | None = [None] * world if rank == 0 else None
    dist.gather_object(agree(read), ranks)
    result: list[str] = [""]
    if ranks is not None:
        result = [joined_checksum(pair for share in ranks for pair in share)]
    dist.broadcast_object_list(result, src=0)
    return result[0]


def part_name(index: MetadataIndex) -> str:
    """What a stored part of a tensor is called in ``model_checksum``."""
    return f"{index.fqn}@{'.'.join(map(str, index.offset or ()))}"


def joined_checksum(digests: Iterable[tuple[str, bytes]]) -> str:
    """``model_checksum`` from the SHA-256 of each part of the model, by ``part_name``."""
    hasher = hashlib.sha256()
    for name, digest in sorted(digests):
        hasher.update(f"{name}:{digest.hex()};".encode())
    return hasher.hexdigest()


def _wrong(flag: str, path: str | Path, problem: str, remedy: str) -> RecipeError:
    return RecipeError(f"{flag} {path} {problem}; {remedy}")


def _newest(args: Namespace, flag: str, root: str) -> tuple[str, int, bool]:
    """Folder, iteration (below 0 without one) and whether it is a release, as
    ``_load_base_checkpoint`` chooses them."""
    from megatron.training import checkpointing

    iteration, release = _tracked(flag, root)
    iteration = getattr(args, "ckpt_step", None) or iteration
    if getattr(args, "non_persistent_ckpt_type", None) == "global":
        beside = getattr(args, "non_persistent_global_ckpt_dir", None)
        beside = beside or os.path.join(root, checkpointing._NON_PERSISTENT_CKPT_SUBDIR)
        newer, _ = _tracked("--non-persistent-global-ckpt-dir", beside)
        if newer != -1 and newer >= iteration:
            return beside, newer, False
    return root, iteration, release


def _tracked(flag: str, root: str) -> tuple[int, bool]:
    """What the tracker file of a folder says, -1 without one."""
    from megatron.training import checkpointing

    if not checkpointing.checkpoint_exists(root):
        return -1, False
    tracker = checkpointing.get_checkpoint_tracker_filename(root)
    try:
        return checkpointing.read_metadata(tracker)
    except (AssertionError, OSError, SystemExit, UnicodeDecodeError) as error:
        raise _wrong(
            flag,
            root,
            f"has an unreadable {os.path.basename(tracker)}",
            "it must hold an iteration, or the word release",
        ) from error


def _format(args: Namespace, flag: str, folder: str) -> str:
    """Format of an iteration's folder, one that Megatron loads with these arguments."""
    from megatron.training import checkpointing

    try:
        ckpt_format = checkpointing._get_checkpoint_format(folder, args)
    except (OSError, ValueError, NotImplementedError) as error:
        reason = "is not there" if isinstance(error, FileNotFoundError) else "is no checkpoint"
        raise _wrong(
            flag,
            folder,
            f"{reason} ({one_line(str(error), 120)})",
            "name a folder that Megatron saved, or another iteration by --ckpt-step",
        ) from error
    if ckpt_format not in FORMATS:
        raise _wrong(
            flag,
            folder,
            f"is a {ckpt_format} checkpoint, which a student is not loaded from",
            f"convert it to {FORMATS[0]} with Megatron's --ckpt-convert-format",
        )
    # With --auto-detect-ckpt-format Megatron reads it, and asks it for no weights.
    if ckpt_format == "torch_dist" != args.ckpt_format:
        raise fail(
            "--ckpt-format", args.ckpt_format,
            f"does not load {folder}, a {ckpt_format} checkpoint", f"use {ckpt_format}",
        )  # fmt: skip
    return ckpt_format
