"""``moe-inject select`` and ``merge-profiles``: what they print, write and refuse."""

import subprocess
import sys

import numpy as np
import pytest
import yaml

from megatron_moe_inject.cli import main
from megatron_moe_inject.experts.choose.choice import choose_experts
from megatron_moe_inject.experts.choose.profile_file import profile_checksum, write_profile
from megatron_moe_inject.recipe.expert_choice import ExpertChoice, describe_choice
from megatron_moe_inject.recipe.load import recipe_from_yaml
from tests.harness.profiles import changed, from_counts, profile

COUNTS = [[10, 50, 30, 10], [40, 20, 20, 20]]
GATES = [[50.0, 20.0, 20.0, 10.0], [10.0, 10.0, 10.0, 70.0]]


@pytest.fixture
def file(tmp_path, monkeypatch):
    """A profile in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_profile("p.json", profile())
    return "p.json"


def select(capsys, *arguments):
    assert main(["select", *arguments]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_table_and_fragment(file, capsys):
    general = [[10, 80, 5, 5], [40, 20, 20, 20]]
    write_profile(file, from_counts(COUNTS, GATES, general=general))
    out = select(capsys, file, "--method", "token", "--threshold", "0.6", "--ep", "2")
    lines = out.splitlines()
    assert lines[0].startswith("token share until 0.6, ep 2, class code of p.json (sha256 ")
    assert lines[1] == (
        "4 of 8 experts (50.0 %) in 2 of 2 MoE layers: 4.00 k parameters, 5.0 % of the model"
    )
    assert lines[3:6] == [
        "layer  n  tokens   gates  general  lift  experts",
        "    0  2  80.0 %  40.0 %   85.0 %  0.94  1, 2",
        "    1  2  60.0 %  20.0 %   60.0 %  1.00  0, 2",
    ]
    assert (
        "EP 2: the ranks' numbers of chosen experts differ by at most 0 in a layer; "
        "2 to 2 on a rank in all"
    ) in lines
    assert yaml.safe_load(out[out.index("    # ") :])["experts"]["layers"] == {0: [1, 2], 1: [0, 2]}


def test_fragment_pastes_into_a_recipe(file, capsys, tmp_path):
    out = select(capsys, file, "--method", "gate", "--threshold", "0.5", "--output", "f.yaml")
    assert "recipe fragment: f.yaml" in out
    assert "    experts:" not in out
    recipe = recipe_from_yaml(
        "domains:\n  - name: code\n    data: [1]\n"
        + (tmp_path / "f.yaml").read_text()
        + "objective: {alpha: 0, beta: 1}\n"
    )
    asked = ExpertChoice(profile=file, method="gate", threshold=0.5)
    assert recipe.domains[0].experts == ExpertChoice(
        {la: sorted(ids) for la, ids in choose_experts(asked, profile(), "code").items()},
        origin=describe_choice(asked, "code", profile_checksum(profile())),
    )


def test_remarks(file, capsys):
    write_profile(file, from_counts(COUNTS, GATES))
    out = select(capsys, file, "--method", "token", "--threshold", "0.6", "--at-most", "1")
    assert "at most keeps below the threshold: layers 0-1" in out
    assert "general" not in out.split("\n\n")[1]  # no empty columns
    out = select(capsys, file, "--method", "budget", "--budget", "0.125")
    assert "no expert chosen: layers 1" in out
    out = select(capsys, file, "--method", "top_n", "--n", "2", "--layers", "1-1")
    assert "no expert chosen: layers 0" in out


def test_standard_errors_are_shown(file, capsys):
    found = profile()
    out = select(capsys, file, "--method", "top_n", "--n", "1", "--per-expert")
    code, general = found.classes["code"], found.classes["general"]
    share, other = code.selection_share()[0, 2], general.selection_share()[0, 2]
    errors = code.share_error()[0, 2], general.share_error()[0, 2]
    z = (share - other) / np.hypot(*errors)
    first = next(line for line in out.splitlines() if line.split()[:2] == ["1", "2"])
    assert f"{100 * share:.2f} ± {100 * errors[0]:.2f} %" in first
    assert f"{100 * other:.2f} ± {100 * errors[1]:.2f} %" in first
    assert first.endswith(f"{z:.1f}")
    assert "least z" in out
    write_profile(file, changed(found, "general", spread=None))
    out = select(capsys, file, "--method", "top_n", "--n", "1", "--per-expert")
    assert "least z" not in out


@pytest.mark.parametrize("experts", [2, 8, 256])
def test_heat_map(file, tmp_path, capsys, experts):
    matplotlib = pytest.importorskip("matplotlib.image")
    rng = np.random.default_rng(0)
    counts = rng.integers(1, 50, size=(3, experts))
    write_profile(file, from_counts(counts, general=counts[:, ::-1]))
    (tmp_path / "h.png").write_bytes(b"old")
    arguments = [file, "--method", "top_n", "--n", "1", "--heat-map", "h.png"]
    assert "heat map: h.png" in select(capsys, *arguments)
    marked = matplotlib.imread("h.png")
    assert min(marked.shape[:2]) > 300
    assert sorted(p.name for p in tmp_path.iterdir()) == ["h.png", "p.json"]
    select(capsys, *arguments[:-2], "--layers", "0", "--heat-map", "other.png")
    other = matplotlib.imread("other.png")
    black = [(image[..., :3].max(-1) < 0.2).sum() for image in (marked, other)]
    assert black[0] > black[1]  # the frames of two more layers


def test_heat_map_without_matplotlib(file, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    (tmp_path / "h.png").write_bytes(b"old")
    arguments = ["select", file, "--method", "top_n", "--n", "1", "--heat-map", "h.png"]
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "pip install 'megatron-moe-inject[report]'" in captured.err
    assert (tmp_path / "h.png").read_bytes() == b"old"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["p.json"], "--method: missing; choose token"),
        (["p.json", "--method", "token"], "--threshold: missing; method token needs it"),
        (["p.json", "--method", "token", "--threshold", "nan"], "--threshold: nan is not in (0, 1"),
        (["p.json", "--method", "top_n", "--n", "9"], "layer 1: 9 experts are asked for"),
        (["p.json", "--method", "top_n", "--n", "1", "--ep", "3"], "--ep: 3 does not divide 8"),
        (
            ["p.json", "--method", "top_n", "--n", "1", "--at-least", "2"],
            "--at-least: 2 is above n",
        ),
        (["p.json", "--method", "budget", "--budget", "0.01"], "--budget: 0 experts are too few"),
        (["p.json", "--method", "top_n", "--n", "1", "--domain", "x"], "--domain: the profile has"),
        (["p.json", "--method", "top_n", "--n", "1", "--layers", "0"], "--layers: 0 is no MoE lay"),
        (["p.json", "--method", "top_n", "--n", "1", "--layers", "1,1"], "--layers: 1 is named tw"),
        (
            ["p.json", "--method", "top_n", "--n", "1", "--layers", "3-1"],
            "--layers: '3-1' is no li",
        ),
        (["p.json", "--method", "top_n", "--n", "1", "--layers", ""], "--layers: '' is no list"),
        (["none.json", "--method", "top_n", "--n", "1"], "none.json: cannot be read (No such"),
        (
            ["p.json", "--method", "top_n", "--n", "1", "--output", "./p.json"],
            "--output: './p.json' is the profile; name another file",
        ),
        (
            ["p.json", "--method", "top_n", "--n", "1", "--output", "a", "--heat-map", "a"],
            "--heat-map: 'a' is the file of --output",
        ),
        (
            ["p.json", "--method", "top_n", "--n", "1", "--heat-map", "no/a.png"],
            "--heat-map: 'no/a.png' is in no folder that exists",
        ),
        (["p.json", "--method", "top_n", "--n", "1", "--", "--num-layers", "4"], "select takes no"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(file, tmp_path, capsys, arguments, expected):
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert main(["select", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("moe-inject: " + expected), captured.err
    assert captured.err.count("\n") == 1
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_reader_that_leaves_early_is_no_error(file):
    """As in ``moe-inject select ... | head -1``."""
    write_profile(file, from_counts(np.ones((400, 2), int)))
    command = [sys.executable, "-m", "megatron_moe_inject.cli", "select", file, "--per-expert"]
    command += ["--method", "top_n", "--n", "2"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


def test_several_domains_need_a_name(file, capsys):
    write_profile(file, profile(names=("code", "math", "general")))
    arguments = ["select", file, "--method", "top_n", "--n", "1"]
    assert main(arguments) == 2
    assert "--domain: missing; choose one of code, math" in capsys.readouterr().err
    assert main([*arguments, "--domain", "math"]) == 0
    assert "class math of p.json" in capsys.readouterr().out


def test_merging_on_the_command_line(file, tmp_path, capsys):
    for i, name in enumerate(("a.json", "b.json"), start=1):
        write_profile(name, profile(i))
    (tmp_path / "sum.json").write_text("old")
    assert main(["merge-profiles", "a.json", "b.json", "--output", "sum.json"]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[:3] == [
        "class    tokens  sequences  data",
        "code        640         40  /data/code",
        "general     640         40  /data/general",
    ]
    assert out[-1].startswith("sum.json (sha256 ")
    for arguments, expected in (
        (["a.json", "a.json"], "merge-profiles: a.json, a.json; name two or more different"),
        (["a.json"], "merge-profiles: a.json; name two or more different files"),
        (["a.json", "sum.json"], "sum.json: shares recorded tokens with a.json"),
        (["a.json", "none.json"], "none.json: cannot be read"),
    ):
        before = (tmp_path / "sum.json").read_bytes()
        assert main(["merge-profiles", *arguments, "--output", "sum.json"]) == 2
        assert capsys.readouterr().err.startswith("moe-inject: " + expected)
        assert (tmp_path / "sum.json").read_bytes() == before
