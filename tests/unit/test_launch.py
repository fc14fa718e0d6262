"""The launcher, what it refuses, and the patches that replace it."""

import argparse
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megatron_moe_inject import launch
from megatron_moe_inject.host import compat, cpu_lane
from megatron_moe_inject.host.cpu_lane import flags

PATCHES = Path(__file__).resolve().parents[2] / "patches"
REPORT = """
import json, sys
import neighbour
spec = __spec__.name if __spec__ else None
facts = dict(argv=sys.argv, path=sys.path[0], name=__name__, file=__file__, spec=spec,
             is_main=sys.modules["__main__"].__dict__ is globals(), there=neighbour.THERE)
open(sys.argv[1], "w").write(json.dumps(facts))
sys.exit(3)
"""


@pytest.fixture
def started(monkeypatch):
    """Run ``launch.main`` on a command line without installing anything.

    Gives the options that were left for the installation (None when it came not that far) and
    the exit code or message.
    """

    def start(*arguments):
        seen = []
        monkeypatch.setattr(sys, "argv", ["launch", *map(str, arguments)])
        monkeypatch.setattr(sys, "path", ["first", *sys.path])
        monkeypatch.setattr(launch, "prepare", lambda: seen.append(sys.argv[1:]))
        with pytest.raises(SystemExit) as exit_:
            launch.main()
        return (seen[0] if seen else None), exit_.value.code

    return start


@pytest.fixture
def script(tmp_path):
    (tmp_path / "neighbour.py").write_text("THERE = True\n")
    path = tmp_path / "train.py"
    path.write_text(REPORT)
    yield path
    sys.modules.pop("neighbour", None)


def report(path):
    return json.loads(path.read_text())


def test_script_runs_as_python_would_run_it(started, script, tmp_path):
    options, code = started("--cpu", script, tmp_path / "out", "--cpu", "--num-layers", "2")
    assert (options, code) == (["--cpu"], 3)
    facts = report(tmp_path / "out")
    assert facts["argv"] == [str(script), str(tmp_path / "out"), "--cpu", "--num-layers", "2"]
    assert facts["path"] == str(tmp_path)
    assert facts["name"] == "__main__"
    assert facts["file"] == str(script)
    assert facts["spec"] is None
    assert facts["is_main"]
    assert facts["there"]


def test_relative_script_is_found_next_to_its_neighbours(started, script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    relative = os.path.join(tmp_path.name, "train.py")
    assert started(relative, tmp_path / "out") == ([], 3)
    facts = report(tmp_path / "out")
    assert facts["argv"][0] == relative
    assert facts["path"] == str(tmp_path)


def test_module_runs_as_python_would_run_it(started, script, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    options, code = started("--cpu-force", "-m", "train", tmp_path / "out", "-m", "x")
    assert (options, code) == (["--cpu-force"], 3)
    facts = report(tmp_path / "out")
    assert facts["argv"] == [str(script), str(tmp_path / "out"), "-m", "x"]
    assert facts["spec"] == "train"
    assert facts["path"] == "first"  # of python -m: the working directory, not the module's


def test_missing_script_is_one_line_before_anything_is_installed(started):
    options, message = started("--cpu", "nowhere/pretrain_gpt.py", "--num-layers", "2")
    assert options is None
    assert message == "moe-inject: can't open script 'nowhere/pretrain_gpt.py': no such file"


def test_missing_module_is_one_line(started):
    _, message = started("-m", "nowhere.pretrain_gpt")
    assert message == "moe-inject: no module named 'nowhere.pretrain_gpt'"


@pytest.mark.parametrize("arguments", [(), ("--cpu",), ("-m",), ("--gpu", "train.py")])
def test_unusable_command_line_shows_the_usage(started, arguments):
    assert started(*arguments) == (None, launch.USAGE)


def test_lane_refuses_a_machine_with_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    untouched = torch.cuda.synchronize, torch.Tensor.cuda
    monkeypatch.setattr(sys, "argv", ["launch", "--cpu", "--num-layers", "2"])
    with pytest.raises(SystemExit, match=r"this one has 8: .*--cpu-force"):
        launch.prepare()
    assert not cpu_lane.is_enabled()
    assert (torch.cuda.synchronize, torch.Tensor.cuda) == untouched


def test_without_a_gpu_what_trains_says_what_to_add(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["pretrain", "--num-layers", "2"])
    with pytest.raises(SystemExit, match=r"moe-inject: no GPU found: add --cpu before"):
        launch.require_device()
    monkeypatch.setattr(sys, "argv", ["pretrain", "--help"])
    launch.require_device()
    monkeypatch.setattr(sys, "argv", ["pretrain", "--num-layers", "2"])
    monkeypatch.setattr(cpu_lane, "is_enabled", lambda: True)
    launch.require_device()


def test_without_a_gpu_a_script_begins_with_a_remark(started, script, tmp_path, capsys):
    assert started(script, tmp_path / "out") == ([], 3)
    error = capsys.readouterr().err
    if torch.cuda.is_available():
        assert error == ""
    else:
        assert error.startswith("moe-inject: no GPU found; to train: add --cpu before")


def lane_arguments(**changed):
    plain = {"distributed_backend": "gloo", "transformer_impl": "local", "cuda_graph_impl": "none"}
    return argparse.Namespace(**{**plain, "moe_grouped_gemm": False, "fp8": None, **changed})


def test_lane_accepts_flags_that_need_no_gpu():
    flags.check(lane_arguments(moe_token_dispatcher_type="alltoall"))


@pytest.mark.parametrize(
    "changed",
    [
        {"transformer_impl": "transformer_engine"},
        {"moe_grouped_gemm": True},
        {"fp8": "hybrid"},
        {"moe_token_dispatcher_type": "flex"},
        {"cuda_graph_impl": "local"},
    ],
)
def test_lane_names_the_flag_it_cannot_honour(changed):
    ((name, value),) = changed.items()
    flag = {"fp8": "--fp8-format"}.get(name, "--" + name.replace("_", "-"))
    with pytest.raises(flags.CpuLaneFlagError, match=rf"{flag} \(is {value!r}\): \w+"):
        flags.check(lane_arguments(**changed))


@pytest.mark.parametrize("flag", ["window_size", "dataloader_inter_document_masking"])
def test_lane_names_what_its_context_parallelism_lacks(flag):
    one_rank = lane_arguments(**{flag: True}, context_parallel_size=1)
    flags.check(one_rank)
    one_rank.context_parallel_size = 2
    with pytest.raises(flags.CpuLaneFlagError, match=r"--\S+ with --context-parallel-size 2: "):
        flags.check(one_rank)


def test_lane_names_packs_that_a_window_does_not_divide():
    packed = lane_arguments(window_size=(7, 0), sft=True)
    with pytest.raises(flags.CpuLaneFlagError, match="--sft with --window-size, "):
        flags.check(packed)
    packed.window_size = None
    flags.check(packed)


def test_lane_names_every_flag_at_once():
    with pytest.raises(flags.CpuLaneFlagError, match=r"--moe-grouped.*; --fp8-format "):
        flags.check(lane_arguments(fp8="e4m3", moe_grouped_gemm=True))


@pytest.fixture
def helper_build(monkeypatch, tmp_path):
    """The wrapped ``compile_helpers`` over a stock one that only counts, in a made-up package."""
    from megatron.core.datasets import utils

    builds = []
    monkeypatch.setattr(utils, "compile_helpers", lambda: builds.append(1))
    monkeypatch.setattr(utils, "__file__", str(tmp_path / "utils.py"))
    compat.use_prebuilt_dataset_helpers()
    compat.use_prebuilt_dataset_helpers()
    helper, source = tmp_path / "helpers_cpp.so", tmp_path / "helpers.cpp"
    for path in (helper, source):
        path.touch()
        os.utime(path, (1, 1))
    spec = SimpleNamespace(origin=str(helper))
    monkeypatch.setattr(compat.importlib.util, "find_spec", lambda name: spec)
    return SimpleNamespace(
        run=lambda: utils.compile_helpers() or len(builds),
        folder=tmp_path,
        helper=helper,
        without_helper=lambda: monkeypatch.setattr(
            compat.importlib.util, "find_spec", lambda name: None
        ),
    )


def test_wheel_uses_the_helper_it_ships(helper_build):
    os.utime(helper_build.helper, (0, 0))  # wheels keep no meaningful times
    assert helper_build.run() == 0


def test_checkout_builds_a_stale_helper_once(helper_build):
    (helper_build.folder / "Makefile").touch()
    assert helper_build.run() == 0
    os.utime(helper_build.helper, (0, 0))
    assert helper_build.run() == 1


def test_missing_helper_is_built_or_fails_as_stock_does(helper_build):
    helper_build.without_helper()
    assert helper_build.run() == 1


def test_origin_warns_only_about_packages_that_would_mix(monkeypatch, tmp_path, capsys):
    import megatron

    root, foreign = compat.megatron_origin()
    assert os.path.isdir(os.path.join(root, "core"))
    assert foreign == []
    for part in ("core", "training", "post_training"):
        (tmp_path / "megatron" / part).mkdir(parents=True)
    monkeypatch.setattr(megatron, "__path__", [root, str(tmp_path / "megatron")])
    _, foreign = compat.megatron_origin()
    missing_here = not os.path.isdir(os.path.join(root, "post_training"))
    assert foreign == ([str(tmp_path / "megatron" / "post_training")] if missing_here else [])


VERSIONS = ("0.18.2", "0.19", "main-2026-08")
SCRIPTS = ("pretrain_gpt", "pretrain_hybrid")


def test_every_patch_folder_is_listed():
    assert sorted(path.name for path in PATCHES.iterdir() if path.is_dir()) == sorted(VERSIONS)
    readme = (PATCHES / "README.md").read_text()
    assert all(f"`{version}/`" in readme for version in VERSIONS)


def test_every_version_has_a_patch_for_each_script():
    there = sorted(str(path.relative_to(PATCHES)) for path in PATCHES.rglob("*.patch"))
    assert there == [f"{version}/{script}.patch" for version in VERSIONS for script in SCRIPTS]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_patch_adds_the_import_and_the_call_and_nothing_else(version, script):
    lines = (PATCHES / version / f"{script}.patch").read_text().splitlines()
    header, body = lines[:3], lines[3:]
    assert header[1:] == [f"--- a/{script}.py", f"+++ b/{script}.py"]
    hunk = re.match(r"@@ -(\d+),(\d+) \+(\d+),(\d+) @@", body[0])
    start, before, new_start, after = map(int, hunk.groups())
    changed = [line for line in body[1:] if line[:1] in "+-"]
    assert [line[1:] for line in changed if line[1:].strip()] == [
        "import megatron_moe_inject",
        "megatron_moe_inject.install()",
    ]
    assert all(line.startswith("+") for line in changed)
    assert start == new_start
    assert after == before + len(changed) == len(body[1:])


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("version", VERSIONS)
def test_patch_applies_to_the_checkout(version, script):
    variable = "MEGATRON_CHECKOUT_" + re.sub(r"\W", "_", version).upper()
    if variable not in os.environ:
        pytest.skip(f"set {variable} to a Megatron-LM checkout of {version}")
    patch = PATCHES / version / f"{script}.patch"
    checkout = os.environ[variable]
    for direction in ((), ("--reverse",)):
        check = subprocess.run(
            ["git", "apply", "--check", "--verbose", *direction, str(patch)],
            cwd=checkout,
            capture_output=True,
            text=True,
        )
        assert (check.returncode == 0) == (direction == ()), check.stderr
        assert f"{script}.py" in check.stderr


def test_imports_of_a_main_module_are_cheap(tmp_path):
    """Worker processes import it again, and ``moe-inject`` answers at once, also about a recipe."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        "domains: [{name: code, data: [1], teacher: t, experts: '1:0'}]\n"
        "teachers: {t: {source: 'hf:/t'}}\nimitation: {hidden: 1}\nsteering: {coeff: 1}\n"
    )
    modules = "megatron_moe_inject.pretrain, megatron_moe_inject.launch, megatron_moe_inject.cli"
    code = (
        f"import sys, {modules}; assert not megatron_moe_inject.cli.main(['plan', sys.argv[1]]);"
        "print('heavy', *{'torch', 'megatron', 'transformers'} & {*sys.modules})"
    )
    command = [sys.executable, "-c", code, str(recipe)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1].split() == ["heavy"]
