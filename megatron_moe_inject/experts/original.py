"""The original model: frozen copies of the parameters that train, swapped in when it must run.

Everything that does not train is the original already, so only what trains is kept twice. A swap
exchanges the parameters' storages, without copying, and back again also after an exception, so the
trained values come back bit for bit; DDP's buffers, which the optimiser writes to, are not touched.

Where much trains, the copies may lie in (pinned) host memory. A pass of the original model then
brings each layer's to the device as the layer begins and drops them as it ends: no more than one
layer is there twice, for one transfer of all that trains per micro-batch of the pass.

The copies are what was loaded when the injection began. A run that may be resumed keeps them on
disk beside its checkpoints, as tensors with keys of their own that can be read at any parallel
layout.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject.experts.borrowed import borrowing, units
from megatron_moe_inject.experts.freeze import places
from megatron_moe_inject.experts.optimizer_state import with_own_keys
from megatron_moe_inject.typed import RecipeError

FOLDER = "inject_original"
_TRAINS = "trains.json"


class OriginalParameters:
    """Frozen copies of the trainable parameters of this rank, projections to teachers aside.

    Args:
        chunks: bare model chunks, holding the original values now.
        trains: what trains, in plain JSON values; stored copies must be of the same.
        components: of what to keep originals, from ``freeze.COMPONENTS``; ``None`` = of all.
        on_host: keep them in host memory.
    """

    def __init__(
        self,
        chunks: Iterable[torch.nn.Module],
        trains: dict[str, Any],
        components: Sequence[str] | None = None,
        *,
        on_host: bool = False,
    ) -> None:
        self._chunks = list(chunks)
        self.on_host = on_host
        kept = {} if components is None else {"originals": list(components)}
        self._trains = json.loads(json.dumps(trains | kept))
        self._copies = {
            parameter: _on_host(parameter) if on_host else parameter.detach().clone()
            for chunk in self._chunks
            for place, parameter in places(chunk)
            if parameter.requires_grad
            and place.component != "projections"
            and (components is None or place.component in components)
        }

    @property
    def bytes(self) -> int:
        """Memory of the copies, where they are kept."""
        return sum(copy.nbytes for copy in self._copies.values())

    def of(self, parameter: torch.Tensor, part: slice | None = None) -> torch.Tensor:
        """The original value of a parameter, a constant on its device; of a frozen one, its own.

        Args:
            part: of the flattened parameter, which is then what is returned.
        """
        value = self._copies.get(parameter, parameter).detach()
        value = value if part is None else value.view(-1)[part]
        return value.to(parameter.device, non_blocking=True) if self.on_host else value

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Those that have an original, in the model's order."""
        return list(self._copies)

    @contextlib.contextmanager
    def running(self, only: Iterable[torch.nn.Parameter] | None = None) -> Iterator[None]:
        """Let the model be the original inside the block. No collective.

        Copies nothing where the originals are on the device. From host memory, ``only`` comes at
        once, and otherwise each layer comes as it runs.

        Args:
            only: parameters with an original; ``None`` = all. A graph that was built outside the
                block, and is not run backward inside it, may hold them.
        """
        if only is None and self.on_host:
            with borrowing(units(self._chunks, self._copies), self.of):
                yield
            return
        wanted = self._copies if only is None else only
        value_of = self.of if self.on_host else self._copies.__getitem__
        with _exchanged({parameter: value_of(parameter) for parameter in wanted}):
            yield

    def save(self, folder: Path, metadata: dict[str, Any]) -> None:
        """Write the copies to ``folder``, whole or not at all; what was there is replaced.

        Args:
            folder: a path that every rank sees.
            metadata: how Megatron builds sharded state (``compat.sharded_state_metadata``).

        Collectives: those of ``dist_checkpointing.save`` and two barriers, over the whole world.
        """
        from megatron.core import dist_checkpointing

        beside, old = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
        if dist.get_rank() == 0:
            for leftover in (beside, old):
                shutil.rmtree(leftover, ignore_errors=True)
            beside.mkdir(parents=True)
        dist.barrier()
        with _exchanged(self._copies):
            dist_checkpointing.save(self._sharded(metadata), str(beside))
        dist.barrier()
        if dist.get_rank() == 0:
            (beside / _TRAINS).write_text(json.dumps(self._trains), encoding="utf-8")
            if folder.exists():
                os.rename(folder, old)
            os.rename(beside, folder)
            shutil.rmtree(old, ignore_errors=True)

    def load(self, folder: Path, metadata: dict[str, Any]) -> None:
        """Read the copies that ``save`` wrote, at this run's layout.

        Collectives: those of ``dist_checkpointing.load`` over the whole world.

        Raises:
            RecipeError: the folder is damaged, or holds the originals of other parameters.
        """
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.core import CheckpointingException
        from torch.distributed.checkpoint.api import CheckpointException

        begun = self._read_trains(folder)
        if begun != self._trains:
            raise _unfit(folder, f"holds the originals of {begun}, but now {self._trains} trains")
        with _exchanged(self._copies):
            try:
                state = dist_checkpointing.load(self._sharded(metadata), str(folder))
            except (CheckpointException, CheckpointingException, OSError, ValueError) as error:
                reason = str(error).strip().splitlines()[-1]
                raise _unfit(folder, f"cannot be read ({reason[:160]})") from error
            for index, chunk in enumerate(self._chunks):
                own = dict(chunk.named_parameters())
                for name, value in state[f"chunk{index}"].items():
                    own[name].data.copy_(value)

    @staticmethod
    def _read_trains(folder: Path) -> Any:
        try:
            return json.loads((folder / _TRAINS).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _unfit(folder, f"is damaged ({error})") from error

    def _sharded(self, metadata: dict[str, Any]) -> dict[str, Any]:
        """Sharded state of the trainable parameters, by chunk and local name."""
        state: dict[str, Any] = {}
        for index, chunk in enumerate(self._chunks):
            names = [name for name, p in chunk.named_parameters() if p in self._copies]
            whole = chunk.sharded_state_dict(metadata=metadata) if names else {}
            state[f"chunk{index}"] = {name: with_own_keys(whole[name]) for name in names}
        return state


@contextlib.contextmanager
def _exchanged(values: Mapping[torch.nn.Parameter, torch.Tensor]) -> Iterator[None]:
    """Inside the block, parameters have these storages."""
    current = {parameter: parameter.data for parameter in values}
    try:
        for parameter, value in values.items():
            parameter.data = value
        yield
    finally:
        for parameter, data in current.items():
            parameter.data = data


def _on_host(parameter: torch.Tensor) -> torch.Tensor:
    copy = torch.empty_like(parameter, device="cpu", pin_memory=parameter.is_cuda)
    return copy.copy_(parameter.detach())


def _unfit(folder: Path, problem: str) -> RecipeError:
    return RecipeError(
        f"retention: {folder} {problem}; train what the run began to train, or start an "
        "injection of its own with --finetune and another --save"
    )
