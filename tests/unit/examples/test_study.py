"""The study's own logic: arms as recipes, what is run and what is not, which evaluation counts,
the table and the aims, and the HTML that the second domain is made of."""

import json
import sys
from pathlib import Path

import pytest

from megatron_moe_inject.data.section import MIXING
from megatron_moe_inject.evaluation.section import EVALUATION
from megatron_moe_inject.recipe.load import load_recipe
from megatron_moe_inject.retention.section import RETENTION
from megatron_moe_inject.routing.section import ROUTING, STEERING

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "examples" / "study"))

import arms  # noqa: E402
import domains  # noqa: E402
import pages  # noqa: E402
import study  # noqa: E402
import tables  # noqa: E402


@pytest.mark.parametrize("arm", arms.ARMS, ids=lambda arm: arm.name)
def test_every_arm_is_a_valid_recipe_that_says_what_its_name_says(arm, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(arms.recipe(arm, "html", Path("study/html"), seed=1)))
    recipe = load_recipe(path)
    (domain,) = recipe.domains
    assert (domain.name, domain.data[0]) == ("html", "study/html/data/html_slice")
    taught = ", CE" not in arm.name
    assert (recipe.objective.alpha, recipe.objective.beta) == ((1, 0) if taught else (0, 1))
    assert bool(domain.teacher) is taught
    assert (recipe.train.experts == "all") is arm.name.startswith("full")
    assert recipe.train.attention is (recipe.train.experts == "all")
    assert recipe.train.embedding is (recipe.train.attention or "+ embedding" in arm.name)
    held = any(word in arm.name for word in ("gamma", "...", "adapters", "new"))
    assert recipe[MIXING] == ({"general": 0.1} if held or "mixing" in arm.name else {})
    assert recipe.objective.gamma == (30 if "gamma 30" in arm.name else 10 if held else 0)
    assert [f"rank {entry.rank}" in arm.name for entry in recipe.train.adapters] == (
        [True] if "adapters" in arm.name else []
    )
    rows = recipe.train.vocabulary_rows
    assert (rows is not None) is ("of the rows" in arm.name)
    assert rows is None or f"{rows.budget:.0%}".replace("%", " %") in arm.name
    retained = recipe[RETENTION]
    assert (retained.experts > 0) is ("expert retention" in arm.name)
    assert (retained.l2 > 0) is ("L2" in arm.name)
    assert (recipe[STEERING].coeff > 0) is ("steering" in arm.name)
    assert recipe.train.router is ("router" in arm.name or recipe.train.experts == "all")
    assert recipe[EVALUATION] is not None
    assert (domain.experts.new == "all") is bool(arm.grown) is ("new experts" in arm.name)
    assert recipe.train.router_rows is (bool(arm.grown) and "frozen" not in arm.name)
    assert (recipe[ROUTING].open is not None) is ("a door" in arm.name)


def test_general_text_without_gamma_counts_by_cross_entropy_and_with_it_by_gamma_alone():
    def objective(name):
        return arms.recipe(arms.BY_NAME[name], "code", Path("f"), 1)["objective"]

    assert objective("chosen experts, KD + mixing")["general_beta"] == 1
    assert objective("chosen experts, KD + mixing + gamma")["general_beta"] == 0
    assert objective("chosen experts, KD + mixing + L2")["general_beta"] == 0
    assert objective("chosen experts, KD")["general_beta"] == 0


def test_random_experts_follow_the_seed_and_fill_every_layer():
    drawn = [arms.random_experts(seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert list(drawn[0]) == [0, 1, 2, 3]
    assert all(len(set(ids)) == 2 and set(ids) <= set(range(8)) for ids in drawn[2].values())


def test_cross_entropy_counts_at_its_best_evaluation_and_is_measured_on_the_way():
    early, late = arms.BY_NAME["full, CE"], arms.BY_NAME["full, KD"]
    losses = [2.0, 1.8, 1.7, 1.7, 1.9]
    assert arms.counted(early, losses) == 2
    assert arms.counted(early, [2.0, 2.1]) == 0
    assert arms.counted(late, losses) == 4
    assert arms.evaluation_interval(early, 150) == 25
    assert arms.evaluation_interval(late, 150) == 150
    assert arms.evaluation_interval(early, 3) == 1


def run_of(arm, *bits, domain="code", seed=1, trained=20, text="t", **other):
    """A finished run: ``bits`` are (domain, general) at each evaluation."""
    return {
        **{"domain": domain, "arm": arm, "seed": seed, "steps": 100, "sequences": 8},
        "iterations": [50 * at for at in range(len(bits))],
        "domain_bits": [own for own, _ in bits],
        "general_bits": [general for _, general in bits],
        **{"teacher_bits": 1.0, "text": text, "trained": trained, "parameters": 100},
        **{"step_seconds": 0.5, "versions": {"python": "3.12.1"}, **other},
    }


def test_finished_runs_are_not_open_and_seeds_go_in_rounds():
    options = study.parse(["--seeds", "1", "2", "--steps", "100", "--arms", "full, CE", "full, KD"])
    everything = study.open_runs([], options)
    assert [run[:3] for run in everything][:5] == [
        *(("code", "full, CE", 1), ("code", "full, KD", 1)),
        *(("html", "full, CE", 1), ("html", "full, KD", 1), ("code", "full, CE", 2)),
    ]
    finished = [run_of("full, KD", (2, 2)), {**run_of("full, CE", (2, 2)), "steps": 99}]
    left = study.open_runs(finished, options)
    assert set(everything) - set(left) == {("code", "full, KD", 1, 100, 8)}


def test_an_interrupted_study_goes_on_where_it_was(tmp_path, monkeypatch):
    began = []

    def train(domain, arm, seed, folder, options):
        began.append(arm.name)
        if len(began) == 2:
            raise KeyboardInterrupt
        return run_of(arm.name, (2.0, 2.0), (1.5, 2.1), domain=domain, seed=seed)

    monkeypatch.setattr(study, "train", train)
    monkeypatch.setattr(domains, "prepare", lambda *_, **__: None)
    command = ["study.py", "--domains", "code", "--seeds", "1", "--steps", "100"]
    command += ["--arms", "full, CE", "full, KD", "chosen experts, KD", "--results", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(KeyboardInterrupt):
        study.main()
    with (tmp_path / "runs.jsonl").open("a") as file:
        file.write('{"domain": "code", "arm": "full, K')
    study.main()
    assert began == ["full, CE", "full, KD", "full, KD", "chosen experts, KD"]
    study.main()
    assert len(began) == 4
    assert len(study.read_runs(tmp_path / "runs.jsonl")) == 3
    assert (tmp_path / "study-100x8.png").stat().st_size > 10_000
    table = (tmp_path / "study-100x8.md").read_text()
    assert "| Python code | full, KD | 1 | 0.500 | 0.100 |" in table


START = (2.0, 1.7)
RUNS = [
    run_of("full, CE", START, (1.95, 2.1), (2.1, 2.4), trained=100),
    run_of("chosen experts, CE", START, (1.9, 2.3), (1.94, 2.5)),
    run_of("full, KD + mixing + gamma", START, (1.6, 1.8), trained=100),
    run_of("chosen experts, KD", START, (1.5, 2.4)),
    run_of("chosen experts, KD + mixing + gamma", START, (1.7, 1.74)),
    run_of("chosen experts, KD + mixing + gamma", START, (1.72, 1.76), seed=2),
    run_of("random experts, KD + mixing + gamma", START, (1.61, 1.7)),
    run_of("10 of 32 experts, KD + mixing + gamma", START, (1.5, 1.74), trained=26),
]


def test_rows_hold_every_seed_at_the_evaluation_that_counts():
    rows = {row["arm"]: row for row in tables.summary(RUNS)}
    assert rows["untouched"]["domain_bits"] == 2.0
    assert rows["full, CE"]["gain"] == pytest.approx([0.05])
    assert rows["full, CE"]["forgotten"] == pytest.approx([0.4])
    assert rows["full, CE"]["last_gain"] == pytest.approx([-0.1])
    assert rows["full, CE"]["counted_at"] == [50]
    ours = rows["chosen experts, KD + mixing + gamma"]
    assert ours["seeds"] == [1, 2]
    assert ours["gain"] == pytest.approx([0.3, 0.28])
    text = tables.markdown(list(rows.values()), [])
    assert "| 2 | 0.290 (0.280-0.300) | 0.050 (0.040-0.060) | 20.0 % | 50 | 50 |" in text
    assert "untouched (2.000; the teacher leads by 1.000)" in text


def test_aims_are_judged_by_the_best_arm_with_gamma_and_few_chosen_experts():
    judged = tables.aims(tables.summary(RUNS))
    assert {aim["arm"] for aim in judged} == {"chosen experts, KD + mixing + gamma"}
    reached = [aim["reached"] for aim in judged]
    assert reached == pytest.approx([0.29 / 0.4, 0.05 / 0.1, 0.29 / 0.1, 0.05 / 0.6])
    assert [aim["met"] for aim in judged] == [False, True, False, True]
    assert [aim["beside"] for aim in judged[1:3]] == [arms.FULL_REFERENCE, "chosen experts, CE"]
    better = [*RUNS[:-1], {**RUNS[-1], "trained": 25}]
    judged = tables.aims(tables.summary(better))
    assert {aim["arm"] for aim in judged} == {"10 of 32 experts, KD + mixing + gamma"}
    assert [aim["met"] for aim in judged] == [True, True, True, True]


def test_new_experts_are_judged_by_the_least_forgetting_for_their_gain():
    chosen = "10 of 32 experts, KD + mixing + gamma"
    new = ("10 new experts", (1.6, 1.8)), ("10 new experts, led by steering", (1.72, 1.74))
    runs = [*RUNS, *(run_of(name, START, (*end,), trained=25) for name, end in new)]
    judged = [a for a in tables.aims(tables.summary(runs)) if a["beside"] == chosen]
    assert {aim["arm"] for aim in judged} == {"10 new experts, led by steering"}
    assert [aim["limit"] for aim in judged] == ["at least 1", "at most 0.5"]
    assert len(judged) == 2


def test_aims_need_the_arms_that_they_speak_of():
    assert tables.aims(tables.summary(RUNS[2:])) == []
    assert tables.aims(tables.summary(RUNS[:2])) == []


@pytest.mark.parametrize("other", [{"text": "other"}, {"versions": {"python": "3.13.0"}}])
def test_runs_on_different_text_are_not_compared(other):
    with pytest.raises(ValueError, match="different held-out text"):
        tables.summary([*RUNS, run_of("full, KD", START, **other)])


def test_each_seed_has_held_out_samples_of_its_own():
    row = tables.summary([*RUNS, run_of("full, KD", START, (1.6, 1.8), seed=3, text="other")])
    assert {"full, KD"} < {own["arm"] for own in row}


def test_the_committed_tables_are_those_of_the_committed_runs():
    runs = study.read_runs(study.RESULTS / "runs.jsonl")
    sizes = {(run["steps"], run["sequences"]) for run in runs}
    names = {size: f"study-{size[0]}x{size[1]}.md" for size in sizes} | {study.SIZE: "study.md"}
    for size, name in names.items():
        rows = tables.summary([r for r in runs if (r["steps"], r["sequences"]) == size])
        assert (study.RESULTS / name).read_text() == tables.markdown(rows, tables.aims(rows))
    assert len({study.key(run) for run in runs}) == len(runs)


PAGE = """<td class="title">x</td>
<td class="extra"><a href="file:/home/me/x.py">/home/me/x.py</a></td>
<dl><dt><strong>own</strong>&nbsp;&lt;function at 0x7F12&gt;</dt></dl>
<hr>
Methods inherited from <a href="io.html#Base">Base</a>:<br>
<dl><dt>close</dt></dl>
<hr>
Data descriptors defined here:<br>
<strong>__warningregistry__</strong> = {'version': 0}
</td></tr></table>"""


def test_a_page_loses_what_is_inherited_and_what_depends_on_the_machine():
    text = pages.clean(PAGE)
    assert "own</strong> &lt;function&gt;" in text
    assert "defined here" in text
    for gone in ("inherited", "close", "/home", "0x7", "warningregistry", "&nbsp;"):
        assert gone not in text


def test_pieces_are_the_page_and_short_where_entries_allow():
    page = "<p>head" + "".join(f"<dl><dt>entry {i}</dt></dl>" for i in range(40))
    found = pages.pieces(page, 200)
    assert "".join(found) == page
    assert max(map(len, found)) <= 200
    assert len(pages.pieces(page, 10_000)) == 1


def test_a_module_of_another_system_has_no_page_and_one_of_this_python_has():
    assert pages.render("no_such_module_anywhere") is None
    page = pages.render("json.scanner")
    assert "make_scanner" in page
    assert str(Path(sys.prefix)) not in page


def test_shipped_teacher_is_whole_and_is_the_domains():
    import models

    html = domains.DOMAINS["html"]
    path = html.models / f"{html.teacher}.safetensors"
    description = json.loads(path.with_suffix(".json").read_text())
    assert models.checksum(path) == description["sha256"]
    assert description["training"]["iterations"] == html.iterations
    assert path.stat().st_size < 4_000_000
