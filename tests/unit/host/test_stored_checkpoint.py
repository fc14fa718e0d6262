"""Which checkpoint Megatron will load, of every kind, and what is an error before it tries."""

from pathlib import Path

import pytest

from megatron_moe_inject.experts.train.freeze import FreezePolicy
from megatron_moe_inject.experts.train.resume import begin_or_resume
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.run_arguments import (
    stored_argument,
)
from megatron_moe_inject.host.stored_checkpoint import checkpoint_to_load
from tests.harness.checkpoints import TRACKER, load_arguments, write_described


def policy(expert: int) -> FreezePolicy:
    return FreezePolicy({2: frozenset([expert])}, frozenset())


KINDS = {
    "torch_dist": ("torch_dist", {}),
    "torch": ("torch", {"ckpt_format": "torch"}),
    "torch under --ckpt-format torch_dist": ("torch", {}),
    "torch, detected": ("torch", {"auto_detect_ckpt_format": True}),
}


@pytest.mark.parametrize(("kind", "flags"), KINDS.values(), ids=KINDS)
def test_the_policy_is_read_whatever_the_format(tmp_path, kind, flags):
    folder = write_described(tmp_path, 3, kind, inject_policy=policy(3).described())
    assert begin_or_resume(policy(3), load_arguments(tmp_path, **flags)) is None
    with pytest.raises(RecipeError, match=r"iter_0000003 holds .*\{2: \[3\]\}, but now .*\[1\]"):
        begin_or_resume(policy(1), load_arguments(tmp_path, **flags))
    assert stored_argument(load_arguments(tmp_path, **flags), "inject_policy")[0] == folder
    assert stored_argument(load_arguments(tmp_path, finetune=True, **flags), "x") == (None, None)


def rows(experts, **by_layer) -> FreezePolicy:
    chosen = {int(layer[1:]): frozenset(ids) for layer, ids in by_layer.items()}
    return FreezePolicy(experts, frozenset(["router_rows"]), rows=chosen)


@pytest.mark.parametrize("experts", [None, {}], ids=["all", "none"])
def test_rows_of_routers_are_told_apart(tmp_path, experts):
    write_described(tmp_path, 3, inject_policy=rows(experts, l2=[3, 0]).described())
    assert begin_or_resume(rows(experts, l2=[0, 3]), load_arguments(tmp_path)) is None
    for other in (rows(experts, l2=[0, 1]), rows(experts, l3=[0, 3]), rows(experts)):
        with pytest.raises(RecipeError, match=r"router rows \{2: \[0, 3\]\}.*, but now"):
            begin_or_resume(other, load_arguments(tmp_path))


def test_rows_that_an_earlier_version_did_not_store(tmp_path):
    """They were those of the chosen experts, if any were chosen."""
    chosen = {2: frozenset([3])}
    described = rows(chosen, l2=[3]).described()
    del described["router_rows"]
    write_described(tmp_path, 3, inject_policy=described)
    assert begin_or_resume(rows(chosen, l2=[3]), load_arguments(tmp_path)) is None
    write_described(
        tmp_path / "none", 3, inject_policy={"experts": {}, "components": ["router_rows"]}
    )
    with pytest.raises(RecipeError, match="but now router rows"):
        begin_or_resume(rows({}, l2=[3]), load_arguments(tmp_path / "none"))


@pytest.mark.parametrize("kind", ["torch_dist", "torch"])
def test_a_stock_checkpoint_starts_the_optimizer_anew(tmp_path, kind):
    folder = write_described(tmp_path, 3, kind)
    args = load_arguments(tmp_path)
    assert begin_or_resume(policy(3), args).startswith(f"{folder} was saved without injection")
    assert args.no_load_optim


def test_the_checkpoint_that_megatron_takes(tmp_path):
    """``--ckpt-step``, non-persistent checkpoints, ``--pretrained-checkpoint``, a release."""
    root, beside, base = tmp_path / "run", tmp_path / "beside", tmp_path / "base"
    for iteration in (5, 7):
        write_described(root, iteration, value=iteration)
    write_described(root / "non_persistent", 8, value=8)
    write_described(beside, 6, value=6)
    write_described(base, 40, value=40)
    nonpersistent = {"non_persistent_ckpt_type": "global"}

    def found(**changed):
        checkpoint = checkpoint_to_load(load_arguments(**{"load": root} | changed))
        assert checkpoint.argument("value") == checkpoint.iteration
        return checkpoint

    assert found().folder == root / "iter_0000007"
    assert found(ckpt_step=5).iteration == 5
    assert found(**nonpersistent).root == root / "non_persistent"
    older = nonpersistent | {"non_persistent_global_ckpt_dir": str(beside)}
    assert found(**older).iteration == 7
    assert found(**older, ckpt_step=5).root == beside
    assert found(**nonpersistent).resumes
    assert not found(finetune=True).resumes
    assert found(pretrained_checkpoint=str(base)).root == root
    for load in (None, tmp_path / "empty"):
        taken = found(load=load, pretrained_checkpoint=str(base))
        assert (taken.flag, taken.iteration) == ("--pretrained-checkpoint", 40)
        assert not taken.resumes
    (root / "iter_0000005").rename(root / "release")
    (root / TRACKER).write_text("release")
    release = checkpoint_to_load(load_arguments(root))
    assert (release.folder.name, release.iteration, release.resumes) == ("release", None, False)
    assert release.argument("value") == 5


def test_none_is_found(tmp_path):
    for load in (None, tmp_path, tmp_path / "nowhere"):
        assert checkpoint_to_load(load_arguments(load)) is None
        assert stored_argument(load_arguments(load), "inject_policy") == (None, None)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:40])


BROKEN = {
    "a cut file": (lambda folder: _cut(folder / "common.pt"), {}, "cannot be read"),
    "a cut file of torch": (
        lambda folder: _cut(folder / "mp_rank_00_000" / "model_optim_rng.pt"),
        {"ckpt_format": "torch"},
        "cannot be read",
    ),
    "no folder": (lambda folder: folder.rename(folder.parent / "away"), {}, "is not there"),
    "no checkpoint": (lambda folder: (folder / "metadata.json").unlink(), {}, "is no checkpoint"),
    "a tracker of words": (
        lambda folder: (folder.parent / TRACKER).write_text("seven"),
        {},
        f"unreadable {TRACKER}",
    ),
    "sharded by FSDP": (
        lambda folder: (folder / "metadata.json").rename(folder / ".metadata"),
        {},
        "is a torch_dcp checkpoint",
    ),
    "another --ckpt-format": (lambda folder: None, {"ckpt_format": "torch"}, "does not load"),
    "another --ckpt-format, detected": (
        lambda folder: None,
        {"ckpt_format": "torch", "auto_detect_ckpt_format": True},
        "does not load",
    ),
    "local": (lambda folder: None, {"non_persistent_ckpt_type": "local"}, "'local' keeps"),
    "no --pretrained-checkpoint": (
        lambda folder: (folder.parent / TRACKER).unlink(),
        {"pretrained_checkpoint": "/nowhere/base"},
        "/nowhere/base holds no checkpoint, and neither does --load",
    ),
}


@pytest.mark.parametrize(("damage", "flags", "message"), BROKEN.values(), ids=BROKEN)
def test_what_megatron_cannot_load_is_an_error(tmp_path, damage, flags, message):
    """Never "no policy": an optimizer state would be taken over without having been compared."""
    kind = "torch" if message == "cannot be read" and flags else "torch_dist"
    damage(write_described(tmp_path, 3, kind, inject_policy=policy(3).described()))
    with pytest.raises(RecipeError, match=message):
        begin_or_resume(policy(1), load_arguments(tmp_path, **flags))
