"""Files that a run reads, against checksums that the user has (``--inject-verify-inputs``).

Neither safetensors nor Megatron's checkpoints hold checksums, so a flipped bit in a weight goes
unnoticed unless somebody kept them: ``SHA256SUMS`` in the folder, with names relative to it as
``sha256sum`` writes them, or ``FILE.sha256`` beside a file. Every file that is read of a teacher,
and of ``train.fp8_source``, must have one. Megatron writes none with a checkpoint, so the student's
``--load`` is checked where its folder has some, and else the run says that it was not.

The ranks share the work: those of a node for what they read from there (a file may lie on each
node), all ranks for the student's checkpoint, which is on storage that they share.
"""

from __future__ import annotations

import hashlib
import os
import re
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch.distributed as dist

from megatron_moe_inject.host.agreement import agree
from megatron_moe_inject.host.errors import (
    RecipeError,
    fail,
    listing,
)
from megatron_moe_inject.recipe.schema import Recipe
from megatron_moe_inject.teachers.sources import SOURCES

FLAG = "--inject-verify-inputs"
SUMS = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-fA-F]{64})(?:\s+\*?(.+))?")


@dataclass(frozen=True)
class _Folder:
    """One input: the key or flag that names it, as what, and the files that are read of it."""

    key: str
    written: str
    path: Path
    files: tuple[Path, ...]

    def error(self, problem: str, remedy: str) -> RecipeError:
        return fail(self.key, self.written, problem, remedy)


def verify_inputs(recipe: Recipe, args: Namespace) -> str:
    """Check what the run is going to read; what to say of it.

    Collectives: those of ``agree``.

    Raises:
        RecipeError: on every rank: a file without a checksum, or one that has another content.
    """
    world = (dist.get_rank(), dist.get_world_size())
    node = world
    if "LOCAL_WORLD_SIZE" in os.environ and "LOCAL_RANK" in os.environ:
        node = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
        node = (node[0] % node[1], node[1])
    return agree(lambda: _verify(recipe, args, node, world))


def _verify(recipe: Recipe, args: Namespace, node: tuple[int, int], world: tuple[int, int]) -> str:
    lines = []
    for name, spec in recipe.teachers.items():
        folder = _folder(f"teachers.{name}.source", spec.source)
        result = "not checked, since it is no folder" if folder is None else _check(folder, *node)
        lines.append(f"teacher {name}: {result}")
    if recipe.train.fp8_source is not None:
        folder = _folder("train.fp8_source", recipe.train.fp8_source)
        assert folder is not None
        lines.append(f"train.fp8_source: {_check(folder, *node)}")
    for flag in ("load", "pretrained_checkpoint"):
        student = _student(flag, args)
        if student is None:
            continue
        where = f"--{flag.replace('_', '-')} {student.path}"
        if _known(student):
            lines.append(f"{where}: {_check(student, *world)}")
        else:
            lines.append(f"{where}: not checked, since it has no {SUMS}")
    return "\n".join(f"verified inputs: {line}" for line in lines)


def _folder(key: str, written: str) -> _Folder | None:
    """The files that are read of a source; ``None`` where it is no folder."""
    name, _, text = written.partition(":")
    folder, kind = _Folder(key, written, Path(text.strip()).expanduser(), ()), SOURCES[name]
    if not kind.is_folder:
        return None
    if kind.folder is not None:
        folder = replace(folder, path=kind.folder(folder))
    files = _everything(folder.path) if kind.files is None else tuple(kind.files(folder))
    return replace(folder, files=files)


def _student(flag: str, args: Namespace) -> _Folder | None:
    """The iteration that ``--load`` points to; None without one."""
    written = getattr(args, flag, None)
    if not written:
        return None
    path, step = Path(written), getattr(args, "ckpt_step", None)
    tracker = path / "latest_checkpointed_iteration.txt"
    if step is None and tracker.is_file():
        step = tracker.read_text().strip()
    if step is not None:
        path /= f"iter_{int(step):07d}" if str(step).isdigit() else str(step)
    return _Folder(f"--{flag.replace('_', '-')}", written, path, _everything(path))


def _everything(path: Path) -> tuple[Path, ...]:
    ours = (SUMS, ".sha256")
    return tuple(sorted(p for p in path.rglob("*") if p.is_file() and not p.name.endswith(ours)))


def _known(folder: _Folder) -> dict[Path, str]:
    """Checksums by file, from the list and from files beside."""
    checksums: dict[Path, str] = {}
    listed = folder.path / SUMS
    if listed.is_file():
        for line in listed.read_text("utf-8", errors="replace").splitlines():
            match = _LINE.fullmatch(line.strip())
            if match and match[2]:
                checksums[folder.path / match[2].removeprefix("./")] = match[1].lower()
    for file in folder.files:
        beside = file.with_name(f"{file.name}.sha256")
        if not beside.is_file():
            continue
        match = _LINE.match(beside.read_text("utf-8", errors="replace"))
        if match:
            checksums[file] = match[1].lower()
    return checksums


def _check(folder: _Folder, rank: int, size: int) -> str:
    """Compare this rank's share; every rank finds what has no checksum."""
    try:
        known = _known(folder)
        without = [str(p.relative_to(folder.path)) for p in folder.files if p not in known]
        if without:
            raise folder.error(
                f"has files without a checksum ({listing(without, 4)}), and {FLAG} asks for them",
                f"get its {SUMS} from where the model is from and put it into {folder.path}, make "
                f"one with 'cd {folder.path} && sha256sum FILES > {SUMS}' while it is known to be "
                f"right, or leave {FLAG} out",
            )
        for file in _share(folder.files, rank, size):
            with file.open("rb") as content:
                digest = hashlib.file_digest(content, "sha256").hexdigest()
            if digest != known[file]:
                raise folder.error(
                    f"is damaged or was changed: {file.relative_to(folder.path)} has the SHA-256 "
                    f"{digest}, and its checksum is {known[file]}",
                    "copy it again",
                )
    except OSError as error:
        raise folder.error(f"cannot be read ({error})", "copy it again") from None
    size_in_all = sum(file.stat().st_size for file in folder.files)
    return f"{len(folder.files)} files, {size_in_all:,} bytes, as their checksums say"


def _share(files: Sequence[Path], rank: int, size: int) -> list[Path]:
    """This rank's files: in falling order of size each goes to whoever has least so far."""
    loads = [0] * size
    share = []
    for file in sorted(files, key=lambda path: (-path.stat().st_size, str(path))):
        least = loads.index(min(loads))
        loads[least] += file.stat().st_size
        if least == rank:
            share.append(file)
    return share
