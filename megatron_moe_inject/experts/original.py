"""The original model: frozen copies of the parameters that train, swapped in when it must run.

Everything that does not train is the original already, so only what trains is kept twice. A swap
exchanges the parameters' storages, without copying, and back again also after an exception, so the
trained values come back bit for bit; DDP's buffers, which the optimiser writes to, are not touched.

The copies are what was loaded when the injection began. A run that may be resumed keeps them on
disk beside its checkpoints, as tensors with keys of their own that can be read at any parallel
layout.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

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
    """

    def __init__(
        self,
        chunks: Iterable[torch.nn.Module],
        trains: dict[str, Any],
        components: Sequence[str] | None = None,
    ) -> None:
        self._chunks = list(chunks)
        kept = {} if components is None else {"originals": list(components)}
        self._trains = json.loads(json.dumps(trains | kept))
        self._copies = {
            parameter: parameter.detach().clone()
            for chunk in self._chunks
            for place, parameter in places(chunk)
            if parameter.requires_grad
            and place.component != "projections"
            and (components is None or place.component in components)
        }

    @property
    def bytes(self) -> int:
        """Memory of the copies."""
        return sum(copy.nbytes for copy in self._copies.values())

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The original value of a parameter, a constant; its own value where it is frozen."""
        return self._copies.get(parameter, parameter).detach()

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """Those that have an original, in the model's order."""
        return list(self._copies)

    @contextlib.contextmanager
    def swapped(self, only: Iterable[torch.nn.Parameter] | None = None) -> Iterator[None]:
        """Let the model be the original inside the block. No collective, no copy.

        Args:
            only: parameters with an original; ``None`` = all. A graph that was built outside the
                block, and is not run backward inside it, may hold them.
        """
        wanted = self._copies if only is None else only
        current = {parameter: parameter.data for parameter in wanted}
        try:
            for parameter in current:
                parameter.data = self._copies[parameter]
            yield
        finally:
            for parameter, data in current.items():
                parameter.data = data

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
        with self.swapped():
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
        with self.swapped():
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


def _unfit(folder: Path, problem: str) -> RecipeError:
    return RecipeError(
        f"retention: {folder} {problem}; train what the run began to train, or start an "
        "injection of its own with --finetune and another --save"
    )
