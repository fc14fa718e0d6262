"""The original model: frozen copies of the parameters that train, swapped in when it must run.

Everything that does not train is the original already, so only what trains is kept twice. A swap
exchanges the parameters' storages, without copying, and back again also after an exception, so the
trained values come back bit for bit; DDP's buffers, which the optimiser writes to, are not touched.

Where much trains, the copies may lie in (pinned) host memory. A pass of the original model then
brings each layer's to the device as the layer begins and drops them as it ends: no more than one
layer is there twice, for one transfer of all that trains per micro-batch of the pass.

The copies are what was loaded when the injection began. A run that may be resumed keeps them on
disk beside its checkpoints, as tensors with keys of their own that can be read at any parallel
layout, with the identity of their injection (``lineage``).
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from megatron_moe_inject.experts.train.described import in_layers_of
from megatron_moe_inject.host.agreement import agree, on_first_rank
from megatron_moe_inject.host.beside import Beside
from megatron_moe_inject.host.errors import (
    RecipeError,
    one_line,
)
from megatron_moe_inject.host.files import new_folder, replace_file
from megatron_moe_inject.host.gpt_names import to_gpt
from megatron_moe_inject.host.layer_pattern import LayerPattern
from megatron_moe_inject.host.lineage import CARD, Lineage
from megatron_moe_inject.host.megatron_types import Chunk
from megatron_moe_inject.host.model_parts import BESIDE, places
from megatron_moe_inject.host.own_keys import changed_shards, with_own_keys
from megatron_moe_inject.retention.borrowed import borrowing, units

FOLDER = "inject_original"


class OriginalParameters:
    """Frozen copies of the trainable parameters of this rank, projections to teachers aside.

    Args:
        chunks: bare model chunks, holding the original values now.
        trains: what trains, in plain JSON values; stored copies must be of the same.
        components: of what to keep originals, from ``freeze.COMPONENTS``; ``None`` = of all.
        on_host: keep them in host memory.
        beside: what stands beside the model, of which the original has nothing.
    """

    def __init__(
        self,
        chunks: Iterable[Chunk],
        trains: dict[str, Any],
        components: Sequence[str] | None = None,
        *,
        on_host: bool = False,
        beside: Sequence[Beside] = (),
    ) -> None:
        self._beside = tuple(beside)
        self._chunks = list(chunks)
        self.on_host = on_host
        extra = {} if components is None else {"originals": list(components)}
        self._trains = json.loads(json.dumps(trains | extra))
        text = getattr(self._chunks[0], "hybrid_layer_pattern", None)
        self._pattern = None if text is None else LayerPattern(text)
        self._copies = {
            parameter: _on_host(parameter) if on_host else parameter.detach().clone()
            for chunk in self._chunks
            for place, parameter in places(chunk)
            if parameter.requires_grad
            and place.component not in ("projections", *BESIDE)
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
        copies: Mapping[Any, torch.Tensor] = self._copies  # any tensor may be asked for
        value = copies.get(parameter, parameter).detach()
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
        with contextlib.ExitStack() as stack:
            for beside in self._beside:
                stack.enter_context(beside.off())
            if only is None and self.on_host:
                stack.enter_context(borrowing(units(self._chunks, self._copies), self.of))
            else:
                wanted = self._copies if only is None else only
                value_of = self.of if self.on_host else self._copies.__getitem__
                values = {parameter: value_of(parameter) for parameter in wanted}
                stack.enter_context(_exchanged(values))
            yield

    def carry(self, lineage: Lineage, save: Path | None, metadata: dict[str, Any]) -> str | None:
        """Read the originals of an injection that goes on, and see that they lie in ``save``.

        Args:
            lineage: which injection.
            save: the folder of checkpoints to come, which every rank sees; ``None``: nothing is
                written.
            metadata: how Megatron builds sharded state (``host.compat.sharded_state_metadata``).

        Returns:
            A remark for the plan, or None.

        Collectives: those of ``on_first_rank``, ``load`` and ``save``.

        Raises:
            RecipeError: on every rank: the originals of an injection that goes on are missing,
                damaged or of other parameters, or they cannot be written.
        """
        folder = Path(FOLDER) if save is None else save / FOLDER
        source, remarks = on_first_rank(lambda: self._sought(lineage, folder))
        if source is not None:
            agree(lambda: self.load(source, metadata))
        if save is None:
            return "; ".join(remarks) or None
        if source is not None and source.parent.resolve() == save.resolve():
            lineage.keep(FOLDER, source)
            return "; ".join(remarks) or None
        lineage.keep(FOLDER, folder)
        assert lineage.identity is not None, "agreed before parts are attached"
        moved = self.save(folder, metadata, lineage.identity, lambda: lineage.make_room(folder))
        return "; ".join([*remarks, *([moved] if moved else [])]) or None

    @staticmethod
    def _sought(lineage: Lineage, own: Path) -> tuple[Path | None, list[str]]:
        if lineage.begins:
            known = lineage.checkpoint
            remark = (
                f"retention: {known} is of no injection, so the original is the model as loaded"
            )
            return None, [] if known is None else [remark]
        source = lineage.find(own, FOLDER, own_first=True)
        if source is None:
            remedy = (
                f"copy {FOLDER} of that run beside the checkpoint"
                if lineage.was_kept(FOLDER) or not lineage.identity
                else "the checkpoint's run kept none, as it had no retention: train without"
            )
            raise RecipeError(
                f"retention: the original parameters of the injection that goes on from "
                f"{lineage.checkpoint} are in none of {lineage.sought(own, FOLDER)}; {remedy}, or "
                "start an injection of its own with --finetune"
            )
        if lineage.identity:
            return source, []
        return source, [
            f"retention: {lineage.checkpoint} was saved by a version that gave injections no "
            f"identity, so {source} is taken for its original"
        ]

    def save(
        self,
        folder: Path,
        metadata: dict[str, Any],
        injection: str = "",
        make_room: Callable[[], str | None] = lambda: None,
    ) -> str | None:
        """Write the copies to ``folder``, whole or not at all.

        Args:
            folder: a path that every rank sees.
            metadata: how Megatron builds sharded state (``host.compat.sharded_state_metadata``).
            injection: the identity that the folder is to carry.
            make_room: called on the first rank when all is written, to make the name free.

        Returns:
            What ``make_room`` said.

        Collectives: those of ``dist_checkpointing.save``, ``agree`` and ``on_first_rank``, over the
        whole world.

        Raises:
            RecipeError: on every rank: something cannot be written.
        """
        from megatron.core import dist_checkpointing

        with contextlib.ExitStack() as stack:

            def begin() -> Path:
                with _writing(folder):
                    return stack.enter_context(new_folder(folder))

            def write() -> None:
                with _writing(folder), _exchanged(self._copies):
                    dist_checkpointing.save(self._sharded(metadata), str(beside))

            def end() -> str | None:
                with _writing(folder):
                    card = {"injection": injection, "trains": self._trains}
                    if self._pattern is not None:
                        card["layers"] = self._pattern.symbols
                    replace_file(beside / CARD, json.dumps(card).encode())
                    moved = make_room()
                    stack.close()
                    return moved

            beside = on_first_rank(begin)
            agree(write)
            return on_first_rank(end)

    def load(self, folder: Path, metadata: dict[str, Any]) -> None:
        """Read the copies that ``save`` wrote, at this run's layout.

        Collectives: those of ``dist_checkpointing.load`` over the whole world.

        Raises:
            RecipeError: the folder is damaged, or holds the originals of other parameters.
        """
        from megatron.core import dist_checkpointing
        from megatron.core.dist_checkpointing.core import CheckpointingException
        from torch.distributed.checkpoint.api import CheckpointException

        begun, layers = self._read_card(folder)
        pattern = self._pattern if layers is None else None
        if pattern is not None:
            begun = in_layers_of(begun, pattern)
        if begun != self._trains:
            raise _unfit(folder, f"holds the originals of {begun}, but now {self._trains} trains")
        with _exchanged(self._copies):
            try:
                state = dist_checkpointing.load(self._sharded(metadata, pattern), str(folder))
            except (CheckpointException, CheckpointingException, OSError, ValueError) as error:
                raise _unfit(folder, f"cannot be read ({_reason(error)})") from error
            for name, parameter in self._kept():
                parameter.data.copy_(state[name])

    @staticmethod
    def _read_card(folder: Path) -> tuple[Any, str | None]:
        """What trained, and the layers of a hybrid model that its numbers are of."""
        try:
            card = json.loads((folder / CARD).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise _unfit(folder, f"is damaged ({error})") from error
        # Before folders had an identity, what trains stood alone.
        whole = isinstance(card, dict) and "trains" in card
        return (card["trains"], card.get("layers")) if whole else (card, None)

    def _kept(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Parameters with an original, by a name that is theirs on this rank alone."""
        for index, chunk in enumerate(self._chunks):
            for name, parameter in chunk.named_parameters():
                if parameter in self._copies:
                    yield f"{index}.{name}", parameter

    def _sharded(
        self, metadata: dict[str, Any], of_gpt: LayerPattern | None = None
    ) -> dict[str, Any]:
        """Sharded state of the parameters with an original; by the names of a GPT model whose
        blocks are of that pattern.

        Flat, and nothing but tensors: what else there is, Megatron stores as the first rank has it
        and gives to every rank, whatever the layout.
        """
        state: dict[str, Any] = {}
        for index, chunk in enumerate(self._chunks):
            names = [name for name, p in chunk.named_parameters() if p in self._copies]
            whole = chunk.sharded_state_dict(metadata=metadata) if names else {}
            state |= {f"{index}.{name}": with_own_keys(whole[name]) for name in names}
        if of_gpt is None:
            return state
        return changed_shards(state, lambda shard: replace(shard, key=_gpt_key(shard.key, of_gpt)))


def _gpt_key(key: str, pattern: LayerPattern) -> str:
    """The key under which a GPT model stores the original of a hybrid model's tensor."""
    name, _, place = key.partition("@")
    axes = tuple(int(part) for part in place.split(".")) if place else ()
    in_gpt = to_gpt(name, axes, pattern)
    if in_gpt is None:
        return key
    return "@".join([in_gpt[0], ".".join(map(str, in_gpt[1]))]) if in_gpt[1] else in_gpt[0]


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except (CheckpointException, CheckpointingException, OSError) as error:
        raise RecipeError(
            f"retention: the original parameters cannot be written to {folder} "
            f"({_reason(error)}); give --save a folder with room for them"
        ) from error


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return one_line(lines[-1], 160) if lines else type(error).__name__


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
