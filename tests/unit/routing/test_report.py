"""``moe-inject routing-report``: what it shows of two profiles, and what it refuses."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_moe_inject.cli import main
from megatron_moe_inject.experts.choose.profile_file import read_profile, write_profile
from tests.harness.profiles import from_counts, profile

BEFORE = [[10, 50, 30, 10], [40, 20, 20, 20]]
AFTER = [[10, 20, 60, 10], [40, 20, 40, 0]]
GENERAL = [[25, 25, 25, 25], [50, 50, 0, 0]]


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Two profiles in the working directory."""
    monkeypatch.chdir(tmp_path)
    write_profile("a.json", from_counts(BEFORE, general=GENERAL))
    write_profile("b.json", from_counts(AFTER, general=GENERAL))
    return ["a.json", "b.json"]


def report(capsys, *arguments):
    assert main(["routing-report", *arguments]) == 0
    return capsys.readouterr().out


def test_table(files, capsys):
    lines = report(capsys, *files, "--experts", "0:2;1:2,3").splitlines()
    assert [line.split() for line in lines[3:6]] == [
        [
            "layer",
            *[
                "code",
                "on",
                "targets",
                "code",
                "moved",
                "general",
                "on",
                "targets",
                "general",
                "moved",
                "unused",
            ],
        ],
        ["0", "30.0", ">", "60.0", "30.0", "25.0", ">", "25.0", "0.0", "0", ">", "0"],
        ["1", "40.0", ">", "40.0", "20.0", "0.0", ">", "0.0", "0.0", "0", ">", "1"],
    ]
    assert "on targets: share of the class's choices" in lines[7]
    assert "on targets" not in report(capsys, *files)


def test_targets_come_from_a_recipe(files, capsys, tmp_path):
    (tmp_path / "r.yaml").write_text(
        "domains: [{name: code, data: [1], experts: {layers: {0: [2]}}}]\n"
        "objective: {alpha: 0, beta: 1}\n"
    )
    out = report(capsys, *files, "--recipe", "r.yaml")
    assert "30.0 > 60.0" in out


def test_heat_map(files, capsys, tmp_path):
    image = pytest.importorskip("matplotlib.image")
    out = report(capsys, *files, "--experts", "0:2", "--heat-map", "m.png")
    assert "heat map: m.png" in out
    marked = image.imread("m.png")
    report(capsys, *files, "--heat-map", "n.png")
    plain = image.imread("n.png")
    black = [(np.asarray(i)[..., :3].max(-1) < 0.2).sum() for i in (marked, plain)]
    assert black[0] > black[1]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--experts", "7:0"], "--experts: layer 7 is no MoE layer"),
        (["--experts", "0:9"], "--experts: layer 0 has no expert 9; they are 0 to 3"),
        (["--domain", "prose"], "--domain: the profile has no class 'prose'"),
        (["--heat-map", "a.json"], "--heat-map: 'a.json' is a profile"),
        (["--heat-map", "no/such/m.png"], "is in no folder that exists"),
    ],
)
def test_mistakes(files, capsys, arguments, expected):
    before = Path(files[0]).read_bytes()
    assert main(["routing-report", *files, *arguments]) == 2
    assert expected in capsys.readouterr().err
    assert Path(files[0]).read_bytes() == before


def test_profiles_of_two_students(files, capsys):
    write_profile("b.json", profile())
    assert main(["routing-report", *files]) == 2
    assert "compare profiles of one student" in capsys.readouterr().err


def test_new_experts_have_columns_and_a_table_of_their_own(files, capsys, tmp_path):
    for name, counts in (("a.json", BEFORE), ("b.json", AFTER)):
        plain = from_counts(counts, general=GENERAL)
        provenance = replace(plain.provenance, new_experts={1: [2, 3]})
        write_profile(name, replace(plain, provenance=provenance))
    assert read_profile("a.json").provenance.new_experts == {1: [2, 3]}
    lines = report(capsys, *files).splitlines()
    assert lines[3].split("  ")[-1] == "unused"
    assert "code on new" in lines[3]
    assert "40.0 > 40.0" in lines[5]
    assert "general on new" in lines[3]
    assert any(line.startswith("on new: share of the class's choices") for line in lines)
    assert main(["select", "b.json", "--method", "top_n", "--n", "1"]) == 0
    out = capsys.readouterr().out.splitlines()
    head = next(i for i, line in enumerate(out) if line.split()[:2] == ["layer", "new"])
    assert out[head + 1].split() == ["1", "2-3", "40.0", "%", "0.0", "%"]
