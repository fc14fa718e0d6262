"""The steering study's report: runs of two dates side by side, none counted twice."""

import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[3] / "examples" / "benchmarks"
FIRST = BENCHMARKS / "results" / "2026-11-22-steering.json"


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.delitem(sys.modules, "steering_study", raising=False)
    import steering_study

    return steering_study


def result(arm, seed, code=1.8):
    """A run as it is recorded, of a student that had 2.05 and 1.72."""
    return {
        "arm": arm,
        "seed": seed,
        "steps": 200,
        "date": "2026-11-26",
        "machine": "a box",
        "held_out": {"code": code, "english": 1.75},
        "validation": {"target share/code": 0.4, "general on targets/code": 0.2},
        "details": {"balance within": 0.9, "dead within": 0.25, "dead outside": 0.5},
    }


BEFORE = {"code": 2.05, "english": 1.72}


def test_the_first_report_is_read_with_the_seeds_that_it_ran(study):
    runs = study.earlier_runs(FIRST, 200)
    assert len(runs) == 16
    frozen = [run for run in runs if run["arm"] == "0.01, router frozen"]
    assert [run["seed"] for run in frozen] == [1234, 1]
    assert {(run["date"], run["machine"]) for run in runs} == {("2026-11-22", None)}
    assert not study.earlier_runs(FIRST, 100)


def test_new_runs_go_beside_earlier_ones_and_replace_their_own(study, tmp_path, capsys):
    new = [
        study.run_numbers(result(arm, seed), BEFORE)
        for arm, seed in (("no steering, router held", 1), ("0.1, router", 1234))
    ]
    assert new[0]["gain"] == pytest.approx(0.25)
    assert new[0]["forgotten"] == pytest.approx(0.03)
    assert new[0]["dead"] == 0.75
    path = tmp_path / "report"
    study.write_report(new, study.earlier_runs(FIRST, 200), path)
    stored = json.loads(path.with_suffix(".json").read_text())["runs"]
    assert len(stored) == 17
    assert [run["date"] for run in stored if run["arm"] == "0.1, router"] == ["2026-11-26"]
    rows = path.with_suffix(".md").read_text().splitlines()
    assert any(row.startswith("| no steering, router held | 1 | 0.250") for row in rows)
    assert "0.1, router, seed 1234, 2026-11-22 and again: gain 0.2546 and 0.2500" in (
        capsys.readouterr().out
    )
    assert path.with_suffix(".png").stat().st_size > 10_000
    assert study.earlier_runs(path.with_suffix(".json"), 200) == stored
