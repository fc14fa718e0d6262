"""Which injection a checkpoint belongs to, and where what belongs to it lies.

An injection begins where a run takes a checkpoint that knows of none, or starts anew
(``--finetune``), and lasts through every run that goes on from one of its own. It has an identity,
drawn at its beginning and kept in Megatron's arguments, so that each of its checkpoints carries it.

Some of its state is too large for arguments, or has readers of its own: the original parameters,
the list of evaluations, the run's list. These lie in ``--save`` and carry the identity too. A run
that goes on looks for what carries the identity of its checkpoint beside that checkpoint, in
``--load``, where the checkpoint says that it was last kept, and in ``--save``; nothing else is
used, whatever its name, and what belongs to another injection is moved aside before its name is
taken. Checkpoints of versions before identities, and what lies beside them, have the identity
``""``.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
from argparse import Namespace
from pathlib import Path
from typing import Any

from megatron_moe_inject.host.agreement import on_first_rank
from megatron_moe_inject.host.errors import (
    RecipeError,
    one_line,
)
from megatron_moe_inject.host.files import whole_lines
from megatron_moe_inject.host.run_arguments import (
    stored_argument,
)

STORED = "inject_lineage"
"""Name in Megatron's arguments: ``identity``; ``kept``, absolute paths of what belongs to it, by
name; and ``gate``, the teacher gate's verdict (``evaluation.gate``)."""
CARD = "trains.json"
"""The file that describes a folder, with its identity."""
_EARLIER, _UNREADABLE = "earlier", "damaged"
_BEGINNING = 8


class Lineage:
    """The injection that a run begins or goes on with.

    Args:
        args: Megatron's arguments; identity and places are kept in them.

    Attributes:
        identity: of the injection; ``None`` of one that begins, until ``agree``.
        begins: whether no checkpoint of the injection is loaded.
        checkpoint: the folder of the checkpoint whose training goes on, ``None`` without one.
        verdict: the teacher gate's, ``None`` without one.

    Raises:
        RecipeError: the checkpoint cannot be read.
    """

    def __init__(self, args: Namespace) -> None:
        self._args = args
        self.checkpoint, stored = stored_argument(args, STORED)
        earlier = stored is None and stored_argument(args, "inject_policy")[1] is not None
        self.begins = stored is None and not earlier
        self.identity: str | None = stored["identity"] if stored else "" if earlier else None
        self._kept: dict[str, str] = dict(stored["kept"]) if stored else {}
        self.verdict: dict[str, Any] | None = stored["gate"] if stored else None

    def agree(self) -> None:
        """Give an injection that begins its identity, the same on every rank.

        Collectives: those of ``on_first_rank``.
        """
        if self.identity is None:
            self.identity = on_first_rank(lambda: secrets.token_hex(16))
        self._store()

    def keep(self, name: str, path: Path) -> None:
        """Let checkpoints to come say where this run keeps what has this name."""
        self._kept[name] = str(path.absolute())
        self._store()

    def judge(self, verdict: dict[str, Any] | None) -> None:
        """Let checkpoints to come have the teacher gate's verdict."""
        self.verdict = verdict
        self._store()

    def _store(self) -> None:
        stored = {"identity": self.identity, "kept": dict(self._kept), "gate": self.verdict}
        setattr(self._args, STORED, stored)

    def find(self, own: Path, name: str, *, own_first: bool = False) -> Path | None:
        """Where a run that goes on finds what an earlier one kept.

        Args:
            own: where this run keeps it.
            name: its name in a ``--save`` folder.
            own_first: look there first rather than last: for what is the same at any iteration.

        Returns:
            An existing path that carries the identity; ``None`` where there is none, or the
            injection begins.

        Raises:
            RecipeError: something in one of the places is damaged, so that nobody knows whose it
                is.
        """
        if self.begins:
            return None
        assert self.identity is not None, "an injection that goes on has an identity"
        places = self._places(own, name)
        for place in [own, *places] if own_first else places:
            for path in (place, _aside(place, self.identity)):
                if path.exists() and identity_of(path) == self.identity:
                    return path
        return None

    def _places(self, own: Path, name: str) -> list[Path]:
        assert self.checkpoint is not None, "an injection that goes on has a checkpoint"
        folders = [self.checkpoint.parent, *([Path(self._args.load)] if self._args.load else [])]
        last = [Path(self._kept[name])] if name in self._kept else []
        return list(dict.fromkeys([*(folder / name for folder in folders), *last, own]))

    def sought(self, own: Path, name: str) -> str:
        """For a message: where ``find`` has looked, and where it was last kept."""
        places = ", ".join(str(place.parent) for place in self._places(own, name))
        last = self._kept.get(name)
        return f"{places}{'' if last is None else f' (the checkpoint says: last kept as {last})'}"

    def was_kept(self, name: str) -> bool:
        """Whether the checkpoint says that there was one."""
        return name in self._kept

    def make_room(self, path: Path) -> str | None:
        """Make a name free for what belongs to this injection; to be called on one rank.

        What belongs to another injection goes to a name of its own where checkpoints lie in
        ``--save``, which may need it. What none can need, and what belongs to this injection, is
        left for the caller to replace, but a folder is removed.

        Returns:
            What to say of it.

        Raises:
            RecipeError: something cannot be moved, or no folder be made for it.
        """
        try:
            return self._make_room(path)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise RecipeError(
                f"{one_line(str(path), 200)} cannot be replaced ({reason}); move it away"
            ) from None

    def _make_room(self, path: Path) -> str | None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            return None
        try:
            other = identity_of(path)
        except RecipeError:
            other = _UNREADABLE
        if other not in (None, self.identity) and self._has_checkpoints():
            aside = _free(path, other)
            os.rename(path, aside)
            return (
                f"{path} belongs to another injection, whose checkpoints may need it, and is now "
                f"{aside.name}"
            )
        if path.is_dir():
            shutil.rmtree(path)
        return None

    def _has_checkpoints(self) -> bool:
        save = Path(self._args.save) if self._args.save else None
        return save is not None and any(
            folder.is_dir() for pattern in ("iter_*", "*/iter_*") for folder in save.glob(pattern)
        )


def identity_stored(stored: Namespace | None) -> str | None:
    """The identity of the injection that a checkpoint is of, by the arguments stored in it: ``""``
    before there were any, ``None`` of none."""
    lineage = getattr(stored, STORED, None)
    if lineage is not None:
        return lineage["identity"]
    return None if getattr(stored, "inject_policy", None) is None else ""


def identity_of(path: Path) -> str | None:
    """The identity that a folder or a list carries, ``""`` where it was written before there were
    any; ``None`` of an empty list.

    Raises:
        RecipeError: it is damaged.
    """
    try:
        if path.is_dir():
            plain = json.loads((path / CARD).read_text(encoding="utf-8"))
        else:
            with path.open(encoding="utf-8") as file:
                lines = whole_lines(file.readline())
            if not lines:
                return None
            plain = json.loads(lines[0])
        carrier = plain.get("provenance", plain)
        return carrier.get("injection") or ""
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        line = "" if path.is_dir() else ", line 1"
        raise RecipeError(
            f"{one_line(str(path), 200)}{line}: is damaged or no JSON ({one_line(str(error))}); "
            "restore it from a copy, or move it away"
        ) from None


def _aside(path: Path, identity: str) -> Path:
    return path.with_name(f"{path.stem}.{identity[:_BEGINNING] or _EARLIER}{path.suffix}")


def _free(path: Path, identity: str) -> Path:
    """``_aside``, or the same with a number where something is there that may be another's."""
    aside, number = _aside(path, identity), 2
    while aside.exists():
        if identity not in ("", _UNREADABLE):  # the same injection's, as it was earlier
            shutil.rmtree(aside) if aside.is_dir() else aside.unlink()
            break
        tag = identity or _EARLIER
        aside, number = path.with_name(f"{path.stem}.{tag}-{number}{path.suffix}"), number + 1
    return aside
