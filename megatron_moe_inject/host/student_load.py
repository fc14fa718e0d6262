"""What is loaded into the student: that there is something, all of it, and what exactly it was.

Megatron begins with random weights where ``--load`` holds no checkpoint, and leaves a parameter at
its initial value where a looser ``--dist-ckpt-strictness``, or the old ``torch`` format, lets a
checkpoint lack it; both after one warning among thousands of lines. Here both are errors, on every
rank. ``torch_dist`` checkpoints are compared by the names that model and optimizer ask for, before
anything is read; what PyTorch then put into each model chunk is compared again, in any format.

Of the two names of a layer's norm (``norm_names``), the one that the checkpoint has is asked for.
``_extra_state``, which Transformer Engine adds to every module and others do not, is asked for
where the checkpoint has it. So no layers need a looser strictness.
"""

from __future__ import annotations

import re
from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_moe_inject.host import compat
from megatron_moe_inject.host.agreement import agree, on_first_rank, union, union_of_names
from megatron_moe_inject.host.errors import (
    RecipeError,
    listing,
)
from megatron_moe_inject.host.layer_pattern import pattern_of
from megatron_moe_inject.host.megatron_types import Chunk
from megatron_moe_inject.host.model_parts import (
    is_adapter,
    is_own,
)
from megatron_moe_inject.host.norm_names import other_name, stored_name
from megatron_moe_inject.host.stored_adapters import refuse_adapters
from megatron_moe_inject.host.stored_checkpoint import (
    StoredCheckpoint,
    checkpoint_to_load,
    model_checksum,
)
from megatron_moe_inject.host.torch_dist import is_training_state

_EXTRA = "_extra_state"
_MTP = "mtp."
_SHOWN = 4


@dataclass(frozen=True)
class Origin:
    """What was loaded into the student.

    Attributes:
        checkpoint: the folder that ``--load`` or ``--pretrained-checkpoint`` names; empty for a
            random start.
        iteration: of the run that wrote it; ``None`` for a release and for a random start.
        sha256: of the model's stored bytes; ``None`` for a random start.
    """

    checkpoint: str = ""
    iteration: int | None = None
    sha256: str | None = None


class StudentLoad:
    """The loading of one run's student.

    Args:
        args: Megatron's arguments.

    Attributes:
        checkpoint: what will be loaded; ``None`` for a random start.
        remarks: what a plan should say of it, once it is loaded.

    Raises:
        RecipeError: there is no checkpoint and ``--inject-from-scratch`` is not given, or it is one
            that Megatron cannot load, as a GPT model's into a hybrid model before 0.19.
    """

    def __init__(self, args: Namespace) -> None:
        self.checkpoint = checkpoint_to_load(args)
        self.remarks: list[str] = []
        self._chunks: list[_ChunkLoad] = []
        if self.checkpoint is not None:
            _check_translated(self.checkpoint, args)
            return
        if getattr(args, "inject_from_scratch", None):
            return
        problem = ": missing" if args.load is None else f" {args.load} holds no checkpoint"
        raise RecipeError(
            f"--load{problem}, so the student would begin with random weights; name a folder that "
            "Megatron saved to, or add --inject-from-scratch if that is meant"
        )

    def watch(self, chunks: Sequence[Chunk]) -> None:
        """Have bare chunks say what they were given. To be called before they are loaded."""
        for chunk in chunks:
            self._chunks.append(_ChunkLoad(len(self._chunks), chunk))

    def read(self, stock: Callable, *args: Any, **kwargs: Any) -> Any:
        """Megatron's ``_load_base_checkpoint``, which reads a checkpoint into what it is given.

        Collectives over the whole world, where a ``torch_dist`` checkpoint is read by every rank:
        those of ``on_first_rank``, three of ``union_of_names`` and one all-reduce of a byte for
        each stored tensor; of the old format, those of ``agree``.

        Raises:
            RecipeError: on every rank: the checkpoint lacks what the student asks for, holds more
                of it or adapters that the student has not, or is not the one that was looked into.
        """
        bound = compat.bound_arguments(stock, args, kwargs)
        if bound.get("rank0"):
            return stock(*args, **kwargs)
        if bound.get("sharded_state_dict") is not None and self.checkpoint is not None:
            state = bound["sharded_state_dict"]
            bound["sharded_state_dict"] = self._fitted(self.checkpoint, state)
        result = self._read(lambda: stock(**bound))
        loaded = None if result[0] is None else Path(result[1])
        expected = None if self.checkpoint is None else self.checkpoint.folder
        if loaded is not None and self.checkpoint is not None and loaded.suffix == ".pt":
            loaded = loaded.parents[1]  # a file of this rank's
        if loaded != expected:
            raise RecipeError(
                f"--load: {loaded or 'no checkpoint'} was loaded, but {expected or 'none'} was "
                "there when this run started; another run writes there: start again"
            )
        return result

    def _read(self, stock: Callable[[], Any]) -> Any:
        checkpoint = self.checkpoint
        if checkpoint is None or checkpoint.format == "torch_dist":
            return stock()

        def read() -> Any:
            try:
                return stock()
            except SystemExit as error:  # Megatron prints what is wrong with a file of this rank
                raise checkpoint.error(
                    f"cannot be read by rank {dist.get_rank()}",
                    "keep the layout that it was saved at, or copy it again",
                ) from error

        return agree(read)

    def verify(self) -> None:
        """Check what the chunks were given, once Megatron has loaded them.

        Collectives: those of ``agree``.

        Raises:
            RecipeError: on every rank, if a parameter of any was left as it was.
        """
        lacking = [name for chunk in self._chunks for name in chunk.lacking]
        left = [name for chunk in self._chunks for name in chunk.left]
        checkpoint = self.checkpoint
        if checkpoint is not None:
            agree(lambda: self._check(checkpoint, lacking, left))
        for chunk in self._chunks:
            chunk.forget()

    def origin(self) -> Origin:
        """What was loaded, with its checksum; to be called by every rank, after loading.

        Collectives: those of ``model_checksum``.

        Raises:
            RecipeError: on every rank: a file cannot be read.
        """
        if self.checkpoint is None:
            return Origin()
        sha256 = model_checksum(self.checkpoint)
        return Origin(str(self.checkpoint.root), self.checkpoint.iteration, sha256)

    def _fitted(self, checkpoint: StoredCheckpoint, state: dict[str, Any]) -> dict[str, Any]:
        """What to ask the checkpoint for, by the names that it has, compared with them."""
        stored = on_first_rank(checkpoint.names)
        fitted = fit(state, stored)
        request = Request.of(fitted)
        compared = request.compared(stored, compat.tokenizer_vocab_size())
        lacking, wrong, states = (union_of_names(names) for names in compared[:3])
        names = model_names(stored)
        asked = union((i for i, flag in enumerate(compared[3]) if flag), len(names))
        left = [name for i, name in enumerate(names) if i not in asked]
        refuse_adapters(left, checkpoint.error)
        self._check(checkpoint, sorted(lacking), left, sorted(wrong))
        if states:
            raise checkpoint.error(
                f"holds no optimizer state of {listing(sorted(states), _SHOWN)}",
                "add --no-load-optim to start the optimizer anew",
            )
        return fitted

    def _check(
        self,
        checkpoint: StoredCheckpoint,
        lacking: Sequence[str],
        left: Sequence[str],
        wrong: Sequence[str] = (),
    ) -> None:
        left = [name for name in left if not is_own(name) and _EXTRA not in name]
        more = [name for name in left if not name.startswith(_MTP)]
        if len(more) < len(left):
            self.remarks = [
                f"{checkpoint.folder} holds layers of multi-token prediction, which are left "
                "out (no --mtp-num-layers)"
            ]
        parts = [f"lacks {listing(lacking, _SHOWN)}"] if lacking else []
        parts += [f"holds {listing(wrong, _SHOWN)}"] if wrong else []
        parts += [f"holds {listing(more, _SHOWN)} besides"] if more else []
        if parts:
            raise checkpoint.error(
                f"is not the student that the flags describe: it {' and '.join(parts)}",
                "give the model's flags of the run that saved it",
            )


def _check_translated(checkpoint: StoredCheckpoint, args: Namespace) -> None:
    """Megatron reads a GPT model's checkpoint into a hybrid model, from 0.19 on. No collective."""
    pattern = pattern_of(args)
    if pattern is None or compat.translates_gpt_checkpoints():
        return
    saved = checkpoint.arguments()
    if saved is None or pattern_of(saved) is not None:
        return
    raise checkpoint.error(
        f"was saved by a GPT model, which Megatron-Core {compat.megatron_version()} does not load "
        f"into a hybrid model (--hybrid-layer-pattern {pattern.text})",
        "run Megatron-Core 0.19 or later, which translates it, start from a hybrid model's "
        "checkpoint, or train it as the GPT model that it is, without a pattern",
    )


def fit(state: dict[str, Any], stored: Mapping[str, Any]) -> dict[str, Any]:
    """A sharded state dict of Megatron's that asks a checkpoint for names that it has.

    Args:
        state: by section, such as ``model`` and ``optimizer``.
        stored: the names.

    Returns:
        The same with the stored names of norms, and without the ``_extra_state`` of modules of
        which none is stored.
    """
    from megatron_moe_inject.host.own_keys import changed_shards, unstacked

    def renamed(shard: Any) -> Any:
        name = stored_name(shard.key, stored)
        return shard if name == shard.key else replace(shard, key=name)

    def own(shard: Any) -> Any:
        """A hybrid run's own key, which Megatron stacks for a GPT checkpoint, as it is there."""
        if not getattr(shard, "prepend_axis_num", 0):
            return renamed(shard)
        alone = renamed(unstacked(shard))
        return alone if alone.key in stored else renamed(shard)

    fitted = dict(state)
    for section in (*_sections(state, "model"), *_sections(state, "optimizer")):
        entries = state[section]
        if section.startswith("model"):
            entries = {
                name: value
                for name, value in entries.items()
                if _EXTRA not in name or getattr(value, "key", None) in stored
            }
        fitted[section] = changed_shards(entries, renamed if section.startswith("model") else own)
    return fitted


@dataclass(frozen=True)
class Request:
    """What one rank asks a checkpoint for.

    Attributes:
        model: shape by name of the student's tensors, ``None`` of other objects.
        vocabulary: of them, those whose rows may differ by padding.
        optimizer: names of the optimizer's.
    """

    model: dict[str, tuple[int, ...] | None]
    vocabulary: frozenset[str]
    optimizer: frozenset[str]

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Request:
        """What a sharded state dict asks for."""
        model = [shard for key in _sections(state, "model") for shard in _shards(state[key])]
        states = (s for key in _sections(state, "optimizer") for s in _shards(state[key]))
        return cls(
            {s.key: tuple(s.global_shape) if hasattr(s, "local_shape") else None for s in model},
            frozenset(s.key for s in model if getattr(s, "allow_shape_mismatch", False)),
            frozenset(s.key for s in states),
        )

    def compared(
        self, stored: Mapping[str, tuple[int, ...] | None], ids: int
    ) -> tuple[list[str], list[str], list[str], bytes]:
        """What the checkpoint lacks of the student, has in another shape, lacks of the optimizer;
        and for each of ``model_names(stored)`` whether this rank asks for it, by either name.

        Args:
            stored: shape by name.
            ids: of the tokenizer; a vocabulary may lack padding alone.
        """
        needed = (n for n in self.model if _EXTRA not in n and (is_adapter(n) or not is_own(n)))
        lacking = [n for n in needed if n not in stored]
        wrong = []
        for name, shape in self.model.items():
            stored_shape = stored.get(name)
            if stored_shape is None or shape is None:
                continue
            if name in self.vocabulary:
                if stored_shape[0] < min(ids, shape[0]):
                    wrong.append(f"{name} of {stored_shape[0]} rows for a tokenizer of {ids} ids")
            elif stored_shape != shape:
                wrong.append(f"{name} of shape {list(stored_shape)}, not {list(shape)}")
        states = [name for name in self.optimizer if name not in stored]
        asked = (n in self.model or other_name(n) in self.model for n in model_names(stored))
        return lacking, wrong, states, bytes(asked)


def model_names(stored: Mapping[str, tuple[int, ...] | None]) -> list[str]:
    """Those of the student's tensors, in an order."""
    return sorted(n for n, shape in stored.items() if shape and not is_training_state(n))


def _sections(state: Mapping[str, Any], kind: str) -> list[str]:
    """Sections of a kind: one, or one for each virtual pipeline stage."""
    return [key for key in state if re.fullmatch(rf"{kind}\d*", key)]


def _shards(state: Any) -> Iterator[Any]:
    """Shards of a sharded state dict, those that a factory will build included."""
    from megatron.core.dist_checkpointing.mapping import (
        ShardedObject,
        ShardedTensor,
        ShardedTensorFactory,
    )

    if isinstance(state, (ShardedTensor, ShardedObject)):
        yield state
    elif isinstance(state, ShardedTensorFactory):
        data = state.data
        if torch.is_tensor(data):  # the names do not depend on what is in it
            data = torch.empty(data.shape, dtype=data.dtype, device="meta")
        yield from _shards(replace(state, data=data).build())
    elif isinstance(state, (dict, list)):
        for value in state.values() if isinstance(state, dict) else state:
            yield from _shards(value)


class _ChunkLoad:
    """What a bare model chunk was given, and what it was not."""

    def __init__(self, index: int, chunk: Chunk) -> None:
        self.lacking = [f"model{index}"]
        self.left: list[str] = []
        self._handle = chunk.register_load_state_dict_post_hook(self._loaded)

    def _loaded(self, chunk: Chunk, incompatible: Any) -> None:
        missing = incompatible.missing_keys
        missing[:] = [name for name in missing if _EXTRA not in name]
        self.lacking = [name for name in missing if not is_own(name)]
        # Megatron loads once more, and less strictly, after an error, and is not told then.
        self.left += [n for n in incompatible.unexpected_keys if n not in self.left]

    def forget(self) -> None:
        """The chunk is not watched any more."""
        self._handle.remove()
