"""Whole tensors of a saved checkpoint, and checkpoints that only say what they are."""

import json
from argparse import Namespace
from pathlib import Path

import torch

from megatron_moe_inject.host.checkpoint_place import CheckpointPlace
from megatron_moe_inject.host.torch_dist import Piece, is_training_state

SAVE = ("--save-interval", "100", "--save")
TRACKER = "latest_checkpointed_iteration.txt"


def whole(checkpoint, name):
    stored = checkpoint.tensors[name]
    target = torch.empty(stored.size, dtype=stored.properties.dtype)
    checkpoint.read([Piece(name, tuple(stored.size), (0,) * len(stored.size), target)])
    return target


def changed(before, after) -> set[str]:
    """Of two checkpoints the tensors, and experts, in which they differ."""
    old, new = (CheckpointPlace("--load", Path(folder)).open() for folder in (before, after))
    names = set()
    for name in (name for name in old.tensors if not is_training_state(name)):
        pair = whole(old, name), whole(new, name)
        if ".experts." not in name:
            names |= set() if torch.equal(*pair) else {name}
            continue
        rows = zip(*pair, strict=True)
        names |= {f"{name}[{i}]" for i, row in enumerate(rows) if not torch.equal(*row)}
    return names


def load_arguments(load, **changed) -> Namespace:
    """Megatron's, as far as they say what is loaded."""
    given = {
        "load": None if load is None else str(load),
        "pretrained_checkpoint": None,
        "finetune": False,
        "no_load_optim": False,
        "ckpt_format": "torch_dist",
        "auto_detect_ckpt_format": False,
        "ckpt_step": None,
        "non_persistent_ckpt_type": None,
        "non_persistent_global_ckpt_dir": None,
    }
    return Namespace(**given | changed)


def write_described(root: Path, iteration: int, kind: str = "torch_dist", **stored) -> Path:
    """The part of a checkpoint that says what it is, and a tracker that points to it."""
    folder = root / f"iter_{iteration:07d}"
    common = {"args": Namespace(**stored), "iteration": iteration}
    if kind == "torch":
        (folder / "mp_rank_00_000").mkdir(parents=True)
        torch.save(common, folder / "mp_rank_00_000" / "model_optim_rng.pt")
    else:
        folder.mkdir(parents=True)
        (folder / "metadata.json").write_text(json.dumps({"sharded_backend": kind}))
        torch.save(common, folder / "common.pt")
    (root / TRACKER).write_text(str(iteration))
    return folder
