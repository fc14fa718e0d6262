"""Two runs on CPUs that measure a checkpoint with new experts against its base, on the same text.

Each is a run of the training command's flags that only evaluates (``moe-inject evaluate``,
``moe-inject profile``), on one process: for models that fit on the machine.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from megatron_moe_inject.evaluation.evaluation import Evaluation
from megatron_moe_inject.evaluation.evaluation_file import read_evaluation
from megatron_moe_inject.experts.choose.profile_file import read_profile
from megatron_moe_inject.experts.choose.routing_profile import RoutingProfile
from megatron_moe_inject.experts.grow.add import Addition
from megatron_moe_inject.experts.grow.bounds import Bounds
from megatron_moe_inject.host.errors import RecipeError, one_line
from megatron_moe_inject.host.new_experts import NewExperts
from megatron_moe_inject.host.text import memory_text

_RECIPE = """
domains: [{name: text, data: [0]}]
objective: {alpha: 0.0, beta: 1.0}
train: {experts: all}
"""
_ALONE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "LOCAL_WORLD_SIZE")
_ONE_PROCESS = (
    *("--tensor-model-parallel-size", "1", "--pipeline-model-parallel-size", "1"),
    *("--context-parallel-size", "1", "--expert-model-parallel-size", "1"),
    *("--expert-tensor-parallel-size", "1"),
)
"""Later flags win over earlier ones."""
_FLOAT32 = 4


class Comparison:
    """What ``--check`` measures.

    Args:
        addition: planned.
        flags: of the training command; what it loads, its number of experts and its layout are
            set here.
        bounds: what the function may move by.

    Raises:
        RecipeError: flags that are missing or do not go with it, or a model that does not fit.
    """

    def __init__(self, addition: Addition, flags: Sequence[str], bounds: Bounds) -> None:
        _check_flags(flags)
        _check_room(addition)
        self._base = addition.checkpoint.folder
        self._flags, self._bounds = flags, bounds

    def __call__(self, folder: Path, card: NewExperts) -> list[str]:
        """Measure both models; what to say.

        Args:
            folder: of the new checkpoint.
            card: of it.

        Raises:
            RecipeError: a run fails, or the function has moved too far.
        """
        with tempfile.TemporaryDirectory() as kept:
            place = Path(kept)
            (place / "recipe.yaml").write_text(_RECIPE)
            models = {
                "before": (_as_save(self._base, place / "base"), card.base_experts),
                "after": (folder, card.experts),
            }
            for name, (load, experts) in models.items():
                own = ["--num-experts", str(experts), "--load", str(load), *_ONE_PROCESS]
                _run("evaluate", place, place / f"{name}.json", [*self._flags, *own])
            _run("profile", place, place / "profile.json", [*self._flags, *own])
            before, after = (read_evaluation(place / f"{name}.json") for name in models)
            profile = read_profile(place / "profile.json")
        return [*self._losses(before, after), *self._chosen(profile, card)]

    def _losses(self, before: Evaluation, after: Evaluation) -> Iterator[str]:
        for name, now in after.classes.items():
            tokens = now.sums["tokens"].sum()
            losses = [x.sums["loss"].sum() / tokens for x in (before.classes[name], now)]
            moved = losses[1] - losses[0]
            if abs(moved) > self._bounds.loss:
                raise RecipeError(
                    f"--most-loss: the loss of {name} moves from {losses[0]:.5f} to "
                    f"{losses[1]:.5f}, by more than {self._bounds.loss:g}; raise the bound if that "
                    "is meant",
                    "--most-loss",
                )
            yield (
                f"loss of {name}: {losses[0]:.6f} before, {losses[1]:.6f} after ({moved:+.2e} nats "
                f"a token, {tokens:.0f} tokens)"
            )

    def _chosen(self, profile: RoutingProfile, card: NewExperts) -> Iterator[str]:
        for name, statistics in profile.classes.items():
            share = statistics.selections[:, card.ids()].sum(1) / statistics.selections.sum(1)
            worst = int(share.argmax())
            layer = profile.provenance.moe_layers[worst]
            if card.rows != "donor":
                self._bounds.check_chosen(float(share[worst]), f"layer {layer} on {name}")
            yield (
                f"new experts get {share.mean():.3%} of the choices of {name}, at most "
                f"{share[worst]:.3%} (layer {layer}), in the new model"
            )


def _check_flags(flags: Sequence[str]) -> None:
    if not flags:
        raise RecipeError(
            "--check: needs the flags of the training command, with the data, behind --", "--check"
        )
    if any(item.partition("=")[0] == "--ckpt-step" for item in flags):
        raise RecipeError(
            "--check: --ckpt-step does not go with it; name the iteration's folder as CKPT",
            "--check",
        )


def _check_room(addition: Addition) -> None:
    """The model in float32 must fit twice: Megatron reads a checkpoint beside the model."""
    elements = sum(stored.size.numel() for stored in addition.checkpoint.tensors.values())
    needed = 2 * _FLOAT32 * elements
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if needed > free:
        raise RecipeError(
            f"--check: the model needs {memory_text(needed)} on one process of CPUs, and "
            f"{memory_text(free)} are free; write it with --unmeasured instead of --check, and "
            "before training measure the new checkpoint in a job of its own: moe-inject profile, "
            "moe-inject evaluate",
            "--check",
        )


def _as_save(folder: Path, root: Path) -> Path:
    """A ``--save`` directory that points to one iteration."""
    root.mkdir()
    release = not folder.name.startswith("iter_")
    name = "release" if release else folder.name
    (root / name).symlink_to(folder.absolute())
    tracker = root / "latest_checkpointed_iteration.txt"
    tracker.write_text("release" if release else str(int(name.removeprefix("iter_"))))
    return root


def _run(command: str, place: Path, output: Path, flags: Sequence[str]) -> None:
    """One run, as a process of its own: Megatron keeps its state in globals."""
    words = [command, str(place / "recipe.yaml"), "--output", str(output), "--cpu", "--", *flags]
    environment = {name: value for name, value in os.environ.items() if name not in _ALONE}
    done = subprocess.run(
        [sys.executable, "-m", "megatron_moe_inject.cli", *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode or not output.is_file():
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        own = [line for line in lines if line.startswith(("megatron_moe_inject:", "moe-inject:"))]
        reason = (own or lines or ["it said nothing"])[-1]
        reason = one_line(reason.removeprefix("megatron_moe_inject: error: "), 300)
        raise RecipeError(f"--check: moe-inject {command} ended without a result: {reason}")
