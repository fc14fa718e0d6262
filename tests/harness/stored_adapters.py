"""Checkpoints with adapters in them, written as a run saves them: the weights as they were, factors
and rows beside them, and the argument that says what they are."""

from __future__ import annotations

import itertools
from argparse import Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.gpt_names import stacked_axes
from megatron_moe_inject.host.stored_adapters import ARGUMENT
from megatron_moe_inject.host.torch_dist import TorchDistCheckpoint
from megatron_moe_inject.host.torch_dist_write import CheckpointWriter
from tests.harness.checkpoints import TRACKER, whole

Site = tuple[str, tuple[int, ...]]


def entry(rank: int, alpha: float, scaling: str = "standard") -> dict[str, Any]:
    """An entry as a run describes it."""
    scale = alpha / (rank if scaling == "standard" else rank**0.5)
    names = {"targets": ["experts"], "rank": rank, "alpha": alpha, "scaling": scaling}
    return {**names, "scale": scale}


def opened(folder: Path, flag: str = "CKPT") -> TorchDistCheckpoint:
    return CheckpointPlace(flag, Path(folder)).open()


def factor_name(site: Site, factor: str, number: int) -> str:
    """Under which a factor of a matrix is stored; ``number`` is the entry's."""
    weight, place = site
    numbers = ".".join(map(str, (number, *place)))
    layer = weight.removeprefix("decoder.layers.").partition(".")[0]
    if weight.startswith("decoder.layers.") and layer.isdigit():
        numbers = ".".join(map(str, (number, int(layer), *place)))
    return f"{weight.removesuffix('.weight')}.inject_adapter.{factor}.{numbers}"


def parts(value: torch.Tensor, axes: int) -> Iterator[tuple[tuple[int, ...], torch.Tensor]]:
    """Parts of a stored tensor with where they begin, as ranks that shard rows and columns write
    them: quarters of each matrix, halves of a vector."""
    for leading in itertools.product(*map(range, value.shape[:axes])):
        blocks = [(leading, value[leading])]
        for axis in range(value.dim() - axes):
            blocks = [
                ((*begin, at), half)
                for begin, block in blocks
                for at, half in zip(
                    (0, (block.shape[axis] + 1) // 2),
                    block.split((block.shape[axis] + 1) // 2, dim=axis),
                    strict=False,
                )
            ]
        for begin, block in blocks:
            yield begin, block.reshape((1,) * axes + tuple(block.shape))


def write_adapters(
    base: Path | str,
    output: Path,
    sites: Mapping[Site, Sequence[int]],
    entries: Sequence[Mapping[str, Any]],
    *,
    ids: Sequence[int] = (),
    dtype: torch.dtype = torch.float32,
    size: float = 0.05,
    described: Mapping[str, Any] | None = None,
) -> dict[str, torch.Tensor]:
    """Write a checkpoint of a base with random adapters.

    Args:
        sites: matrices with the numbers of the entries that they have; entries that no matrix has
            are left out.
        ids: of vocabulary rows, of the embedding and of a head of its own.
        size: of the factors' values.
        described: what else the argument says.

    Returns:
        What was added, by name.
    """
    used = sorted({number for numbers in sites.values() for number in numbers})
    entries = [entries[number] for number in used]
    sites = {site: [used.index(n) for n in numbers] for site, numbers in sites.items()}
    before = opened(base)
    generator = torch.Generator().manual_seed(7)
    added: dict[str, torch.Tensor] = {}

    def random(*shape: int) -> torch.Tensor:
        return (size * torch.randn(shape, generator=generator)).to(dtype)

    for site, numbers in sites.items():
        out, into = tuple(before.tensors[site[0]].size)[stacked_axes(site[0]) :]
        for number in numbers:
            rank = entries[number]["rank"]
            added[factor_name(site, "a", number)] = random(rank, into)
            added[factor_name(site, "b", number)] = random(out, rank)
    for module in ("embedding.word_embeddings", "output_layer"):
        if ids and f"{module}.weight" in before.tensors:
            width = before.tensors[f"{module}.weight"].size[1]
            added[f"{module}.inject_vocabulary_rows"] = random(len(ids), width)
    argument = {
        "version": 1,
        "base": {"checkpoint": str(base), "iteration": None, "sha256": None},
        "entries": [dict(one) for one in entries],
        "vocabulary_rows": {"ids": list(ids)} if ids else None,
        **(described or {}),
    }
    common = dict(before.common)
    arguments = {**vars(common.get("args", Namespace())), "inject_recipe": "r.yaml"}
    common |= {"args": Namespace(**arguments, **{ARGUMENT: argument}), "iteration": 20}
    folder = output / "iter_0000020"
    output.mkdir(parents=True)
    with CheckpointWriter(folder) as writer:
        for name, stored in before.tensors.items():
            for place, part in parts(whole(before, name), stacked_axes(name)):
                writer.tensor([name], stored.size, place, part)
        for name, value in added.items():
            writer.tensor([name], value.shape, (), value)
            state = f"optimizer.state.exp_avg.{name}"
            writer.tensor([state], value.shape, (), torch.zeros_like(value))
        stored_names = before.metadata.state_dict_metadata.keys() - before.tensors.keys()
        writer.nothing(name for name in sorted(stored_names) if "_extra_state" in name)
        writer.finish(common)
    (output / TRACKER).write_text("20")
    return added
