"""Rollouts in training steps: they take the places of samples of a domain's fixed text.

Megatron reads a step's micro-batches as always, from its own sampler and loader, and before
anything of the step looks at them, samples of domains with a folder of rollouts are written over.
So nothing of Megatron's has to know of data that is still being written, shares of a domain are
those of the blend, and where there are no rollouts the fixed text stands. Which rollout goes where
depends on the order of the global batch alone, and on what all ranks were told of the folders.
"""

from __future__ import annotations

import datetime
import json
import time
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject.data.packed import packing_flag
from megatron_moe_inject.host import compat
from megatron_moe_inject.host.agreement import HostWorld
from megatron_moe_inject.host.attached_loss import add_reports
from megatron_moe_inject.host.errors import RecipeError, show_path
from megatron_moe_inject.host.leave import CannotGoOn
from megatron_moe_inject.host.run_arguments import stored_argument
from megatron_moe_inject.host.step import MicroBatch, Step, StepPart
from megatron_moe_inject.host.to_device import to_device
from megatron_moe_inject.recipe.run_part import BuiltStudent, RunContext, RunPart
from megatron_moe_inject.rollouts.file_format import Rollout
from megatron_moe_inject.rollouts.folder import Folder, News, Student
from megatron_moe_inject.rollouts.lanes import Lanes
from megatron_moe_inject.rollouts.reading import FolderReader, Unreadable
from megatron_moe_inject.rollouts.samples import put
from megatron_moe_inject.rollouts.section import ROLLOUTS, folder_of
from megatron_moe_inject.rollouts.shelf import AgePolicy, Place, Shelf, ShelfFile

STATE = "inject_rollouts_state"
"""Name in Megatron's arguments: ``shelves`` by domain, and ``start``, ``start_iteration`` of
``folder.Student``."""
_MARGIN = 600.0
_PAUSE = 1.0
_REPLACED = ("tokens", "labels", "loss_mask", "position_ids", "cu_seqlens", "max_seqlen")


@dataclass
class _Domain:
    """A domain with rollouts.

    Attributes:
        index: its label.
        name: of it.
        path: its folder.
        shelf: what it reads next.
    """

    index: int
    name: str
    path: Path
    shelf: Shelf


@dataclass
class _Told:
    """What the log is to say of a step's samples of a domain on this data-parallel rank.

    Attributes:
        total: all of them.
        taken: those that are rollouts.
        ages: of these, summed, in steps.
        with_loss: those of files that tell their loss by who wrote them.
        losses: these, summed.
    """

    total: float
    taken: float = 0.0
    ages: float = 0.0
    with_loss: float = 0.0
    losses: float = 0.0

    def count(self, file: ShelfFile, iteration: int) -> None:
        """Count a sample of a file."""
        self.taken += 1
        self.ages += iteration - file.iteration
        if file.lm_loss is not None:
            self.with_loss += 1
            self.losses += file.lm_loss


class RolloutsPart(RunPart):
    """Keeps what was read in checkpoints, and takes part in steps before all others."""

    def __init__(self, run: RunContext) -> None:
        self._run = run
        self._begins = run.lineage.begins
        # The model that an injection begins with may have written, too.
        self.writes_about = self._begins
        stored = stored_argument(run.args, STATE)[1] or {}
        self._stored: Mapping[str, Any] = stored

    def attach(self, student: BuiltStudent) -> StepPart:
        """Be ready to look into the folders.

        Collectives: that of ``HostWorld``, and those of ``host_twin``.
        """
        run, spec = self._run, self._run.recipe[ROLLOUTS]
        if self._begins:
            start, begun = run.origin.sha256, compat.optimizer_steps(run.args)
        else:
            start = self._stored.get("start")
            begun = self._stored.get("start_iteration", 0)
        identity = run.lineage.identity
        assert identity is not None, "an injection has its identity before parts are attached"
        whose = Student(identity, start, begun, run.valid_vocab_size)
        shelves = self._stored.get("shelves", {})
        domains = [
            _Domain(index, domain.name, Path(folder), _shelf(shelves.get(domain.name)))
            for index, domain in enumerate(run.recipe.domains)
            if (folder := folder_of(domain)) is not None
        ]
        age = AgePolicy(spec.max_age, spec.stale == "weight")
        packed = packing_flag(run.args) is not None
        tokenize = compat.tokenize()
        folders = {
            domain.name: Folder(
                domain.path,
                whose,
                sequence_length=run.args.seq_length,
                packed=packed,
                age=age,
                tokenize=tokenize,
            )
            for domain in domains
        }
        for domain in domains:
            if dist.get_rank() == 0 and not domain.path.exists():
                fixed = spec.late == "corpus"
                until = f"domain {domain.name} reads its fixed text" if fixed else "steps wait"
                _say(f"{show_path(domain.path)} does not exist yet; until it does, {until}")
        readers = {
            domain.name: FolderReader(
                domain.path, run.args.seq_length, packed, run.valid_vocab_size, tokenize
            )
            for domain in domains
        }
        return RolloutStep(
            run,
            domains,
            folders,
            readers,
            age,
            world=HostWorld(datetime.timedelta(seconds=spec.patience + _MARGIN)),
            data_parallel=Lanes.of(student, run),
            device=student.device,
            whose=whose,
            packed=packed,
        )


def _shelf(stored: dict[str, Any] | None) -> Shelf:
    return Shelf() if stored is None else Shelf.of_plain(stored)


class RolloutStep(StepPart):
    """Puts rollouts into the places of a training step.

    The shelves at its begin are kept until the next one begins, so that a step that Megatron runs
    again reads what it read. What it has taken stands in Megatron's arguments when it ends.
    """

    def __init__(
        self,
        run: RunContext,
        domains: Sequence[_Domain],
        folders: Mapping[str, Folder],
        readers: Mapping[str, FolderReader],
        age: AgePolicy,
        *,
        world: HostWorld,
        data_parallel: Lanes,
        device: torch.device,
        whose: Student,
        packed: bool,
    ) -> None:
        self._args: Namespace = run.args
        self._spec = run.recipe[ROLLOUTS]
        self._domains = domains
        self._folders, self._readers = folders, readers
        self._age = age
        self._world = world
        self._lanes = data_parallel
        self._device = device
        self._whose = whose
        self._packed = packed
        self._consumed = -1
        self._after = {domain.name: domain.shelf for domain in domains}
        self._opened: set[str] = set()
        self._told: dict[str, _Told] = {}
        self._store()

    def rewrite(self, step: Step) -> None:
        """Look into the folders where it is time to, and write rollouts over the step's samples.

        Collectives, over gloo: that of ``Lanes.gather`` where something can be read or is waited
        for; over the world one broadcast of what is new in each folder every ``rollouts.every``
        steps, and while there is too little under ``late: wait``; one all-reduce of a number in
        steps that open files.

        Raises:
            CannotGoOn: on every rank: rollouts did not come, a file is faulty and is to stop the
                run, or one cannot be read again.
        """
        if not step.training:
            return
        if self._args.consumed_train_samples != self._consumed:
            self._consumed = self._args.consumed_train_samples
            for domain in self._domains:
                domain.shelf = self._after[domain.name]
            if step.iteration % self._spec.every == 0:
                self._look(step.iteration, {})
        waits = self._spec.late == "wait"
        some = (d.shelf.waiting(step.iteration, self._age, 1) for d in self._domains)
        if not waits and not any(some):
            self._after = {domain.name: domain.shelf for domain in self._domains}
            self._told = {d.name: _Told(self._here(step, d)) for d in self._domains}
            return
        labels = self._lanes.gather(step.labels)
        places = {d.name: self._lanes.ordered(labels, d.index) for d in self._domains}
        if waits:
            self._wait_for(step.iteration, {name: len(own) for name, own in places.items()})
        self._replace(step, places)

    def end(self, step: Step, reports: Any) -> None:
        """Let checkpoints know what was read, and say how much and how old it was. No
        collective."""
        if not step.training:
            return
        self._store()
        for domain in self._domains:
            told = self._told[domain.name]
            values = {"share": (told.taken, told.total), "age": (told.ages, told.taken)}
            if self._after[domain.name].told:
                values["lm loss"] = (told.losses, told.with_loss)
            add_reports(
                reports,
                {
                    f"rollout {what}/{domain.name}": to_device(torch.tensor(value), self._device)
                    for what, value in values.items()
                },
            )

    def _store(self) -> None:
        state = {
            "shelves": {name: shelf.plain() for name, shelf in self._after.items()},
            "start": self._whose.start,
            "start_iteration": self._whose.start_iteration,
        }
        setattr(self._args, STATE, state)

    def _here(self, step: Step, domain: _Domain) -> float:
        return float((step.labels == domain.index).sum())

    def _lacking(self, iteration: int, needed: Mapping[str, int]) -> dict[str, int]:
        return {
            d.name: needed[d.name] - d.shelf.waiting(iteration, self._age, needed[d.name])
            for d in self._domains
        }

    def _wait_for(self, iteration: int, needed: Mapping[str, int]) -> None:
        """Where ``late: wait``: until there are so many samples of each domain."""
        if not any(self._lacking(iteration, needed).values()):
            return
        self._look(iteration, needed)
        found = self._lacking(iteration, needed)
        for domain in self._domains:
            lacking = found[domain.name]
            if lacking > 0:
                raise CannotGoOn(
                    f"rollouts: {domain.path} lacks {lacking} of {needed[domain.name]} samples of "
                    f"iteration {iteration} after {self._spec.patience:g} s (rollouts.patience); "
                    "see to what writes them and go on from the checkpoint, or write late: corpus"
                )

    def _look(self, iteration: int, needed: Mapping[str, int]) -> None:
        """Let the first rank look, until there is what is needed or patience ends; tell all."""
        said = None
        if dist.get_rank() == 0:
            said = self._said(iteration, needed)
        told = json.loads(self._world.said_by(0, said))
        if isinstance(told, str):
            raise CannotGoOn(told)
        faults: list[str] = []
        for domain, plain in zip(self._domains, told, strict=True):
            news = News.of_plain(plain)
            domain.shelf = domain.shelf.copy()
            domain.shelf.add(news.files)
            faults += news.faults
            if dist.get_rank() == 0:
                for line in news.copies:
                    _say(line)
        if faults and self._spec.faulty == "stop":
            raise CannotGoOn(
                f"rollouts: {faults[0]}; remove it and go on from the checkpoint, or write "
                "faulty: skip"
            )
        if dist.get_rank() == 0:
            for line in faults:
                _say(f"{line}; it is left aside")

    def _said(self, iteration: int, needed: Mapping[str, int]) -> str:
        """On the first rank: what is new in each folder, or why nobody knows, in JSON."""
        try:
            found = [self._found(d, iteration, needed.get(d.name, 0)) for d in self._domains]
        except RecipeError as error:
            return json.dumps(str(error))
        return json.dumps([news.plain() for news in found])

    def _found(self, domain: _Domain, iteration: int, needed: int) -> News:
        """On the first rank: what is new, once there is what is needed or patience has ended."""
        until = time.monotonic() + self._spec.patience
        shelf, news = domain.shelf.copy(), News([], [], [])
        while True:
            more = self._folders[domain.name].look(shelf, iteration)
            shelf.add(more.files)
            news = news.with_more(more)
            enough = shelf.waiting(iteration, self._age, needed) >= needed
            if enough or (news.faults and self._spec.faulty == "stop"):
                return news
            if time.monotonic() >= until:
                return news
            time.sleep(_PAUSE)

    def _replace(self, step: Step, places: Mapping[str, Sequence[tuple[int, int, int]]]) -> None:
        """Take rollouts from the shelves, and put those of this rank's samples into them."""
        taken: dict[str, list[Place]] = {}
        self._after = {domain.name: domain.shelf.copy() for domain in self._domains}
        for name, own in places.items():
            taken[name] = self._after[name].take(len(own), step.iteration, self._age)
        self._open(step, taken)
        put_here: dict[int, list[tuple[int, Sequence[Rollout]]]] = {}
        self._told = {}
        for name, own in places.items():
            mine = sum(rank == self._lanes.rank for rank, _, _ in own)
            told = self._told[name] = _Told(float(mine))
            for (rank, micro_batch, sample), place in zip(own, taken[name], strict=False):
                if rank != self._lanes.rank:
                    continue
                told.count(place.file, step.iteration)
                if step.micro_batches is not None:
                    rollouts = self._readers[name].sample(place)
                    put_here.setdefault(micro_batch, []).append((sample, rollouts))
        for micro_batch, own_samples in put_here.items():
            self._write(step, micro_batch, own_samples)

    def _open(self, step: Step, taken: Mapping[str, Sequence[Place]]) -> None:
        """Read the files of a step on the ranks that read data, all of them or none."""
        files = {
            name: list(dict.fromkeys(place.file for place in places))
            for name, places in taken.items()
        }
        current = {file.sha256 for own in files.values() for file in own}
        new = current - self._opened
        self._opened = current
        if not new:
            return
        problem = None
        if step.micro_batches is not None:
            try:
                for name, own in files.items():
                    self._readers[name].open(own)
            except Unreadable as error:
                problem = str(error)
        rank, world = dist.get_rank(), dist.get_world_size()
        (first,) = self._world.largest([0.0 if problem is None else float(world - rank)])
        if first:
            said = self._world.said_by(world - int(first), problem)
            raise CannotGoOn(
                f"rollouts: {said}; put it back as it was and go on from the checkpoint"
            )

    def _write(
        self, step: Step, micro_batch: int, samples: Sequence[tuple[int, Sequence[Rollout]]]
    ) -> None:
        """Put rollouts into copies of a micro-batch's tensors, of each model chunk and as read."""
        if step.before is None:
            step.before = step.as_read
        for chunk in step.batches:
            if chunk is not None:
                chunk[micro_batch] = self._written(chunk[micro_batch], samples)
        assert step.as_read is not None, "a rank that reads data has read the step's"
        step.as_read = list(step.as_read)
        step.as_read[micro_batch] = self._written(step.as_read[micro_batch], samples)

    def _written(
        self, batch: MicroBatch, samples: Sequence[tuple[int, Sequence[Rollout]]]
    ) -> MicroBatch:
        own = {key: _copied(value) if key in _REPLACED else value for key, value in batch.items()}
        for place, rollouts in samples:
            put(own, place, rollouts, packed=self._packed)
        return own


def _copied(value: Any) -> torch.Tensor:
    """A copy of a batch's tensor, pinned if that is, so that the device takes it without a wait."""
    tensor = torch.as_tensor(value)
    copy = torch.empty_like(tensor, pin_memory=tensor.is_pinned())
    return copy.copy_(tensor)


def _say(text: str) -> None:
    print(f"megatron_moe_inject: rollouts: {text}", flush=True)
