"""Reads what Megatron has cached of a teacher's logits by ``--logits-save-dir`` (main of August
2026, ``megatron/training/distillation``).

    cp{c}_dp{d}__{last}.tar     of a context- and data-parallel rank, up to iteration ``last``
        _meta.json              what the run's samples follow from: seed, sequence length, samples,
                                blend; and how many ids were kept
        {iteration}.pt.zst      a pickle of lists with a tensor [s/c, b, k] for each micro-batch:
                                ``values`` (log-probabilities at temperature 1), ``indices_low``
                                (16 bits of each id) and ``bit_17``

No file says which text it is about: that follows from the order in which the run read its data. So
the data set is built again from the run's flags, its samples are taken in the order of Megatron's
own sampler, and what ``_meta.json`` says of the run must be what these flags say. Each sample with
the token that follows becomes a document.

The teacher read samples as Megatron cut them, documents joined. Its padded ids took part in the
softmax; what they have goes to the ids that are not known.

Shapes: s sequence, b samples of a micro-batch, k ids, c context-parallel and d data-parallel size.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import re
import tarfile
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from megatron_moe_inject.host.batches import dataset_config
from megatron_moe_inject.host.errors import Failure, RecipeError, one_line

_TAR = re.compile(r"cp(\d+)_dp(\d+)__(\d+)\.tar")
_MEMBER = re.compile(r"(\d+)\.pt\.zst")
_META = "_meta.json"
_MOST_IDS = 1 << 17
_UNUSED = -1e3
"""Log-probabilities up to here stand for a place that is not used."""

_Lists = tuple[list[Tensor], list[Tensor]]
"""Of each micro-batch ids and log-probabilities [s/c, b, k]."""


class CachedLogits:
    """A folder of cached logits, sample by sample in the order of the run.

    Args:
        folder: that they were saved into.
        args: Megatron's flags of the run that saved them, parsed and not validated.
        failure: makes errors about the folder.

    Attributes:
        files: the tar files, in order.

    Raises:
        RecipeError: it is no such folder, lacks a rank, or is of another run.
    """

    vocab_size = _MOST_IDS

    def __init__(self, folder: Path, args: Namespace, failure: Failure) -> None:
        self._failure, self._args = failure, args
        named = [(_TAR.fullmatch(path.name), path) for path in folder.iterdir()]
        found = sorted(
            (int(match[1]), int(match[2]), int(match[3]), path) for match, path in named if match
        )
        if not found:
            raise failure("has no cp0_dp0__*.tar", "name what --logits-save-dir has written")
        self._cp = 1 + max(cp for cp, _, _, _ in found)
        self._dp = 1 + max(dp for _, dp, _, _ in found)
        self._by_rank: dict[tuple[int, int], list[Path]] = {
            (cp, dp): [] for cp in range(self._cp) for dp in range(self._dp)
        }
        for cp, dp, _, path in found:
            self._by_rank[cp, dp].append(path)
        for (cp, dp), paths in self._by_rank.items():
            if not paths:
                raise failure(f"lacks all of cp{cp}_dp{dp}__*.tar", "copy it again")
        self.files = [path for _, _, _, path in found]
        self._samples = self._check_flags()
        self.slots = self._check_meta()
        self._texts: Any = None

    def _check_flags(self) -> int:
        """Samples of the run; RecipeError for flags that do not tell its order."""
        args = self._args
        for name in ("seq_length", "micro_batch_size", "global_batch_size"):
            if getattr(args, name, None) is None:
                raise RecipeError(f"--{name.replace('_', '-')}: missing; write the run's behind --")
        if args.rampup_batch_size is not None or args.dataloader_type not in (None, "single"):
            flag = "--dataloader-type" if args.rampup_batch_size is None else "--rampup-batch-size"
            raise RecipeError(f"{flag}: the order of samples under it is not known here")
        if args.global_batch_size % (args.micro_batch_size * self._dp):
            raise RecipeError(
                f"--global-batch-size: {args.global_batch_size} samples are no whole micro-batches "
                f"of {args.micro_batch_size} on the {self._dp} data-parallel ranks of the cache"
            )
        if args.seq_length % (2 * self._cp if self._cp > 1 else 1):
            raise RecipeError(f"--seq-length: {args.seq_length} does not divide by 2 x {self._cp}")
        if args.train_samples is None and args.train_iters is None:
            raise RecipeError("--train-iters: missing; write the run's behind --")
        return args.train_samples or args.train_iters * args.global_batch_size

    def _check_meta(self) -> int:
        """Ids of a token at most; RecipeError where a file is of another run than the flags."""
        from megatron_moe_inject.host.batches import blend_of

        args, slots = self._args, 1
        blend, per_split = blend_of(args)
        own: dict[str, Any] = {
            "seed": args.seed,
            "sequence_length": args.seq_length,
            "train_samples": self._samples,
            "blend": {"kind": "mock", "mock": True},
        }
        if blend is not None:
            own["blend"] = {"kind": "blend", "blend": _named(blend)}
        elif per_split is not None:
            own["blend"] = {"kind": "blend_per_split", "train": _named(per_split[0])}
        for path in self.files:
            meta = self._meta(path)
            saved = meta["identifiers"]
            for key, value in own.items():
                if json.loads(json.dumps(value)) != saved.get(key):
                    raise self._failure(
                        f"is of another run: {path.name} says {key} {saved.get(key)!r}, and the "
                        f"flags {value!r}",
                        "write the flags of the run that saved it behind --",
                    )
            slots = max(slots, int(meta["saver"]["k"]))
        return slots

    def _meta(self, path: Path) -> dict[str, Any]:
        try:
            with tarfile.open(path, "r:") as tar:
                first = tar.next()
                file = None if first is None or first.name != _META else tar.extractfile(first)
                if file is None:
                    raise self._failure(
                        f"has {path.name} without {_META} at its beginning", "copy it again"
                    )
                meta = json.loads(file.read())
                int(meta["saver"]["k"])
                meta["identifiers"].get("seed")
                return meta
        except (
            OSError,
            tarfile.TarError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            problem = f"has {path.name}, which is damaged ({one_line(repr(error))})"
            raise self._failure(problem, "copy it again") from None

    def texts(self) -> Iterator[np.ndarray]:
        """Tokens [s + 1] of each sample, in the order of ``said``."""
        if self._texts is None:
            self._texts = self._dataset()
        for iteration in self._iterations():
            for place in self._places(iteration):
                sample = self._texts[place]
                tokens, last = sample["tokens"], sample["labels"][-1:]
                yield torch.cat([tokens, last]).numpy().astype(np.int64)

    def said(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Ids and log-probabilities [s, k] of what follows each of a sample's tokens but the last;
        -inf where a place is not used."""
        for step in self._steps():
            for micro_batch in range(len(next(iter(step.values()))[0])):
                for dp in range(self._dp):
                    ids, log_probs = (
                        self._whole([step[cp, dp][part][micro_batch] for cp in range(self._cp)])
                        for part in (0, 1)
                    )
                    yield from zip(ids.unbind(1), log_probs.unbind(1), strict=True)

    def _whole(self, parts: list[Tensor]) -> Tensor:
        """Of each context-parallel rank [s/c, b, k] the sequence [s, b, k]: rank r has the r-th and
        the r-th last of 2 c equal pieces."""
        if self._cp == 1:
            return parts[0]
        halves = [part.chunk(2) for part in parts]
        return torch.cat([h[0] for h in halves] + [h[1] for h in reversed(halves)])

    def _dataset(self) -> Any:
        """The run's training data."""
        from megatron.core.datasets.blended_megatron_dataset_builder import (
            BlendedMegatronDatasetBuilder,
        )
        from megatron.core.datasets.gpt_dataset import GPTDataset

        if not hasattr(self._args, "data_parallel_size"):
            self._args.data_parallel_size = self._dp
        config = dataset_config(self._args)
        sizes = [self._samples, 1, 1]
        train, *_ = BlendedMegatronDatasetBuilder(GPTDataset, sizes, lambda: True, config).build()
        return train

    def _places(self, iteration: int) -> Iterator[int]:
        """Samples of an iteration by micro-batch and data-parallel rank, as Megatron's sampler
        deals them out."""
        from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

        args = self._args
        count = args.global_batch_size // (args.micro_batch_size * self._dp)
        dealt = [
            iter(
                MegatronPretrainingSampler(
                    self._samples,
                    iteration * args.global_batch_size,
                    args.micro_batch_size,
                    dp,
                    self._dp,
                )
            )
            for dp in range(self._dp)
        ]
        for _ in range(count):
            for own in dealt:
                yield from next(own)

    def _iterations(self) -> Iterator[int]:
        for path in self._by_rank[0, 0]:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    if match := _MEMBER.fullmatch(member.name):
                        yield int(match[1])

    def _steps(self) -> Iterator[dict[tuple[int, int], _Lists]]:
        """What all ranks have of each iteration, by context- and data-parallel rank."""
        streams = {rank: self._lists(paths) for rank, paths in self._by_rank.items()}
        for iteration in self._iterations():
            step = {}
            for (cp, dp), stream in streams.items():
                number, found = next(stream, (None, None))
                if number != iteration or found is None:
                    raise self._failure(
                        f"has iteration {iteration} of cp0_dp0 and not of cp{cp}_dp{dp}",
                        "copy it again",
                    )
                step[cp, dp] = found
            yield step

    def _lists(self, paths: list[Path]) -> Iterator[tuple[int, _Lists]]:
        args = self._args
        count = args.global_batch_size // (args.micro_batch_size * self._dp)
        shape = (args.seq_length // self._cp, args.micro_batch_size)
        for path in paths:
            try:
                with tarfile.open(path, "r:") as tar:
                    for member in tar:
                        match, file = _MEMBER.fullmatch(member.name), tar.extractfile(member)
                        if match is None or file is None:
                            continue
                        values, ids = _unpacked(file.read())
                        if len(values) != count or any(v.shape[:2] != shape for v in values):
                            shapes = [tuple(v.shape) for v in values]
                            raise self._failure(
                                f"has {member.name} in {path.name} with micro-batches {shapes}, "
                                f"not {count} of {shape}",
                                "write the batch sizes of the run that saved it behind --",
                            )
                        yield int(match[1]), (ids, values)
            except RecipeError:
                raise
            except (OSError, tarfile.TarError, ValueError, KeyError, TypeError) as error:
                problem = f"has {path.name}, which is damaged ({one_line(repr(error))})"
                raise self._failure(problem, "copy it again") from None


def _named(blend: Any) -> list[list[Any]] | None:
    """A blend without folders, as the cache names it."""
    prefixes, weights = blend
    weights = [1.0] * len(prefixes) if weights is None else weights
    return [
        [float(weight), os.path.splitext(os.path.basename(str(prefix)))[0]]
        for weight, prefix in zip(weights, prefixes, strict=True)
    ]


def _unpacked(content: bytes) -> tuple[list[Tensor], list[Tensor]]:
    """Log-probabilities and ids of each micro-batch, [s/c, b, k]; ValueError if they are none."""
    import zstandard

    try:
        whole = zstandard.ZstdDecompressor().decompress(content)
        # Tensors, lists and texts alone: whatever else a pickle may hold is refused.
        found = torch.load(io.BytesIO(whole), weights_only=True)
    except (zstandard.ZstdError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ValueError(one_line(str(error))) from None
    values, ids = [], []
    for log_probs, low, high in zip(
        found["values"], found["indices_low"], found["bit_17"], strict=True
    ):
        if not log_probs.shape == low.shape == high.shape or log_probs.dim() != 3:
            raise ValueError("ids and log-probabilities differ")
        own = log_probs.float()
        values.append(own.masked_fill(own <= _UNUSED / 2, -torch.inf))
        ids.append(low.long() | (high.long() << 16))
    return values, ids
