"""The front doors: launcher, own entry, and the command as users type it."""

import os
import re
import subprocess
import sys

import pytest

from tests.harness import lane
from tests.harness.corpus import write_corpora
from tests.harness.injection import CE_ONLY, OTHER, PROVEN, assert_clean_end, recipe_file
from tests.harness.lane import same_runs
from tests.harness.material import make_material

HYBRID = ("--hybrid-layer-pattern", "*E|*E|*E|*E/*E")
"""For two pipeline ranks: two stages on each, and multi-token prediction."""


@pytest.fixture(scope="session")
def blend(tmp_path_factory) -> list[str]:
    """Data flags of a blend of two datasets with a split of its own for evaluation."""
    general, domain = write_corpora(tmp_path_factory.mktemp("blend"))
    return ["--data-path", "0.4", general, "0.6", domain, "--split", "90,5,5"]


def on_files(flags: list[str], data: list[str]) -> list[str]:
    return [flag for flag in flags if flag != "--mock-data"] + data


def both_entries(flags: list[str], nproc: int) -> tuple[lane.Run, lane.Run]:
    """Our entry, and an unmodified script through the launcher, on the same flags."""
    return lane.run(flags, nproc=nproc), lane.run(flags, nproc=nproc, script=lane.MINIMAL_GPT)


def test_entry_equals_script_on_a_deepseek_like_model():
    router = ("--bf16", *lane.DEEPSEEK_ROUTER, *lane.DISTRIBUTED_OPTIMIZER)
    same_runs(*both_entries(lane.moe(*router, ep=2), 2))


def test_entry_equals_script_under_tensor_parallelism_and_dropout():
    dropout = ("--hidden-dropout", "0.1", "--attention-dropout", "0.1", "--check-for-spiky-loss")
    same_runs(*both_entries(lane.dense(*dropout, "--calculate-per-token-loss", tp=2), 2))


def test_entry_equals_script_on_a_blend_under_context_parallelism(blend):
    same_runs(*both_entries(on_files(lane.moe(cp=2), blend), 2))


def test_splits_may_have_datasets_of_their_own(blend):
    _, _, general, _, domain, *_ = blend
    single = ["--data-path", general, "--split", "100,0,0"]
    per_split = ["--train-data-path", "1", general, "--valid-data-path", "1", domain]
    together = lane.run(on_files(lane.moe("--eval-iters", "0"), single))
    apart = lane.run(on_files(lane.moe(), per_split))
    assert apart.losses() == together.losses()
    assert apart.evaluations
    assert apart.evaluations[0]["lm loss"] > apart.losses()[-1]


def test_entry_equals_script_on_a_hybrid_model_with_virtual_stages_and_prediction():
    ours, script = both_entries(lane.moe(*HYBRID, pp=2), 2)
    assert "mtp_1 loss" in ours.iterations[0]
    same_runs(ours, script)


def test_a_script_injects_into_a_hybrid_model_as_our_entry_does(material):
    recipe = CE_ONLY + "layer_numbers: hybrid\n"
    ours = ("--inject-recipe", recipe_file(material, recipe), "--inject-verify-frozen")
    flags = material.flags("--hybrid-layer-pattern", "*E*E|*E*E", *ours, pp=2)
    entry, script = both_entries(flags, 2)
    assert "lm loss/code" in entry.iterations[-1]
    assert PROVEN.search(script.output)
    same_runs(entry, script)


@pytest.mark.slow
def test_entry_equals_script_on_pipeline_stages():
    same_runs(*both_entries(lane.dense("--num-layers", "4", pp=2), 2))


@pytest.mark.parametrize(
    ("layout", "nproc", "more"),
    [
        pytest.param({"ep": 2}, 2, (), id="ep2", marks=pytest.mark.slow),
        pytest.param({"tp": 2}, 2, (), id="tp2-sp"),
        pytest.param({"pp": 2}, 2, HYBRID, id="pp2-hybrid"),
        pytest.param({"pp": 2}, 2, (), id="pp2", marks=pytest.mark.slow),
    ],
)
def test_installed_but_unused_the_plugin_changes_no_bit(blend, layout, nproc, more):
    flags = on_files(lane.moe(*lane.DISTRIBUTED_OPTIMIZER, *more, **layout), blend)
    stock = lane.run(
        flags, nproc=nproc, script=lane.MINIMAL_GPT, fresh=True, env={"STOCK_MEGATRON": "1"}
    )
    same_runs(lane.run(flags, nproc=nproc, script=lane.MINIMAL_GPT), stock)


def test_entry_refuses_what_it_leaves_to_the_script():
    for flag, message in (
        ("--fim-data", r"--fim-data: .* run Megatron's own script"),
        ("--sft", r"--sft: .*--tokenizer-type is NullTokenizer; use SFTTokenizer"),
    ):
        flags = [f for f in lane.dense("--data-path", "nowhere", flag) if f != "--mock-data"]
        run = lane.run(flags, check=False)
        assert run.returncode == 1
        assert re.search(f"moe-inject: {message}", run.output)
        assert "Traceback" not in run.output


def command(*arguments: str, pythonpath: str = "", **env: str) -> subprocess.CompletedProcess:
    """``python -m ...`` from an empty environment of ranks, as a user types it."""
    path = os.pathsep.join(filter(None, (pythonpath, str(lane.ROOT))))
    return subprocess.run(
        [sys.executable, "-m", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
        timeout=400,
    )


def logged(output: str) -> list[tuple[str, str]]:
    """Loss and grad norm of each iteration, as the log rounds them."""
    return re.findall(r"lm loss: (\S+) .*?grad norm: (\S+) ", output)


def test_documented_command_trains_and_saves(tmp_path):
    flags = [*lane.moe("--save", str(tmp_path), "--save-interval", "3", ep=2), "--num-workers", "2"]
    run = command(
        *("torch.distributed.run", "--standalone", "--nproc-per-node", "2"),
        *("-m", "megatron_moe_inject.launch", "--cpu", *lane.MINIMAL_GPT, *flags),
    )
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("moe-inject: CPU development lane") == 1
    assert run.stdout.count("moe-inject: Megatron-Core") == 1
    assert f"minimal_gpt: {lane.MINIMAL_GPT[0]} {len(flags)}" in run.stdout
    assert (tmp_path / "iter_0000003" / "metadata.json").exists()
    forked = lane.run(lane.moe(ep=2), nproc=2, script=lane.MINIMAL_GPT)
    assert logged(run.stdout) == logged(forked.output)
    assert len(logged(run.stdout)) == 3


def test_missing_script_ends_in_one_line():
    run = command("megatron_moe_inject.launch", "--cpu", "nowhere.py", "--num-layers", "2")
    assert run.returncode == 1
    assert run.stderr.strip().splitlines()[-1].startswith("moe-inject: can't open script")
    assert "Traceback" not in run.stderr


needs_other = pytest.mark.skipif(
    OTHER is None, reason="set MEGATRON_OTHER to an unpacked wheel or a checkout of another version"
)


@pytest.mark.slow
@needs_other
@pytest.mark.parametrize(
    ("layout", "more"),
    [
        pytest.param({"ep": 2}, lane.DEEPSEEK_ROUTER, id="gpt"),
        pytest.param({"pp": 2}, HYBRID, id="hybrid"),
    ],
)
def test_other_megatron_computes_the_same(tmp_path, layout, more):
    where = tmp_path / "where.py"
    where.write_text("import megatron.core; print('imported', megatron.core.__file__)")
    place = lane.run((), script=(str(where),), pythonpath=(OTHER,)).output
    assert f"imported {OTHER}" in place
    flags = lane.moe("--bf16", *more, *lane.DISTRIBUTED_OPTIMIZER, **layout)
    here = lane.run(flags, nproc=2)
    for script in (lane.PRETRAIN, lane.MINIMAL_GPT):
        there = lane.run(flags, nproc=2, script=script, pythonpath=(OTHER,))
        assert there.losses() == here.losses()
        assert there.losses("grad norm") == here.losses("grad norm")


@pytest.mark.slow
@needs_other
def test_other_megatron_injects_into_a_hybrid_model_from_a_hybrid_checkpoint_alone(tmp_path):
    """0.18 does not translate a GPT model's."""
    material = make_material(tmp_path, pythonpath=(OTHER,))
    hybrid = ("--hybrid-layer-pattern", "*E*E*E*E")
    recipe = recipe_file(material, CE_ONLY + "layer_numbers: hybrid\n")
    ours = ("--inject-recipe", recipe, "--inject-verify-frozen")
    flags = material.flags(*hybrid, *ours)
    run = lane.run(flags, pythonpath=(OTHER,), check=False)
    assert_clean_end(run, ("saved by a GPT model", "Megatron-Core 0.18", "--hybrid-layer-pattern"))
    own = str(tmp_path / "own")
    start = material.flags(*hybrid, "--save", own, "--save-interval", "100")
    del start[start.index("--load") : start.index("--load") + 2]
    lane.run(start, pythonpath=(OTHER,))
    flags += ["--load", own]
    there = lane.run(flags, pythonpath=(OTHER,))
    assert PROVEN.search(there.output)
    assert there.losses("lm loss/code") == lane.run(flags).losses("lm loss/code")
