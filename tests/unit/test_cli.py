"""``moe-inject`` and the text of a plan."""

import dataclasses
from argparse import ArgumentParser
from types import SimpleNamespace

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_moe_inject import __version__
from megatron_moe_inject.cli import main
from megatron_moe_inject.data import feature
from megatron_moe_inject.data.files_there import check_data_files
from megatron_moe_inject.experts.train.census import ParameterRow, parameter_table
from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.text import (
    count,
    memory_text,
)
from megatron_moe_inject.recipe.facts import ParallelFacts, StudentFacts
from megatron_moe_inject.recipe.load import recipe_from_yaml
from megatron_moe_inject.recipe.plan import (
    Plan,
    recipe_warnings,
    render_plan,
)
from megatron_moe_inject.recipe.student import student_facts_from_args
from megatron_moe_inject.teachers import fit
from megatron_moe_inject.teachers.base import TeacherInfo
from megatron_moe_inject.teachers.imitation.terms import ImitationTerm, imitation_lines
from megatron_moe_inject.teachers.part import teacher_lines

RECIPE = """
domains:
  - {name: code, data: [1], teacher: coder, experts: {layers: {3: [0, 5], 4: [1, 2, 3]}}}
  - {name: math, data: [/d/math], experts: {layers: {3: [5]}}}
teachers: {coder: {source: "hf:/models/coder", temperature: 2}}
objective: {alpha: 0.7, beta: 0.3, general_beta: 1}
train: {router: true}
"""
STUDENT = "--num-layers 8 --num-experts 16 --data-path 8 /d/en 1 /d/code 1 /d/math"


@pytest.fixture
def recipe_file(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE)
    return str(path)


def test_plan_of_a_recipe_alone(recipe_file, capsys):
    assert main(["plan", recipe_file]) == 0
    out = capsys.readouterr().out
    assert out == "\n".join(
        [
            "moe-inject plan",
            "",
            "domains",
            "  domain     teacher          data",
            "  code       coder            1",
            "  math       (none: CE only)  /d/math",
            "  (general)  (none: CE only)  the rest of the blend",
            "",
            "experts",
            "  domain  layer  experts",
            "  code        3  0, 5",
            "  code        4  1-3",
            "  math        3  5",
            "",
            "loss",
            "  code       =  0.7 * 2^2 * forward_kl(coder || student, T=2) + 0.3 * CE",
            "  math       =  0.3 * CE",
            "  (general)  =  1 * CE",
            "",
            "trains",
            "  5 experts in 2 layers, router; everything else is frozen",
            "",
            "teachers",
            "  teacher  source            kind",
            "  coder    hf:/models/coder  hf",
            "",
            "warnings",
            "  code and math share experts (layer 3: 5)",
            "",
        ]
    )


def test_plan_against_a_student(recipe_file, capsys, monkeypatch):
    """The teacher's own checks have their own tests; here it is whatever its files say."""
    monkeypatch.setattr(feature, "check_data_files", lambda args, facts: None)
    found = TeacherInfo(
        name="coder", source="hf:/models/coder", kind="hf", path="", num_layers=2, hidden_size=8,
        architecture="LlamaForCausalLM", parameters=1_234_567, vocab_rows=9, vocab_size=9,
        max_positions=None, vocabulary="not compared: no size is known", prefix=(2,),
        prefix_told="as its tokenizer does", trained_positions=4,
    )  # fmt: skip
    seen = []
    monkeypatch.setattr(
        fit,
        "check_teacher",
        lambda name, source, student_tokenizer, prefix: seen.append((name, source)) or found,
    )
    flags = f"{STUDENT} --expert-model-parallel-size 4 --moe-layer-freq [0]*2+[1]*6 --mine 3"
    assert main(["plan", recipe_file, "--", *flags.split()]) == 0
    captured = capsys.readouterr()
    assert seen == [("coder", "hf:/models/coder")]
    for line in (
        "  coder    hf:/models/coder  hf (LlamaForCausalLM)  1.23 M",
        "  code       coder            1: /d/code",
        "  math       (none: CE only)  2: /d/math",
        "  (general)  (none: CE only)  0: /d/en",
        "  5 experts in 2 layers (of 96 in 6), router; everything else is frozen",
        "  8 layers, 16 experts in layers 2-7",
        "  layout: EP=4",
        "  not Megatron flags, ignored: --mine 3",
        "  teacher coder: not compared: no size is known",
        "  teacher coder reads id 2 in front of the text (as its tokenizer does)",
    ):
        assert line in captured.out.splitlines()


UNTAUGHT = """
domains: [{name: code, data: [1], experts: {layers: {3: [0]}}}]
objective: {alpha: 0, beta: 1}
steering: {coeff: 0.1, target_mass: 0.5, confidence: none}
train: {router: true}
"""
WATCHES, STEERS = "routing in the log and in profiles", "steering"


@pytest.mark.parametrize(
    ("steered", "flags", "parts"),
    [
        (False, "", set()),
        (False, "--inject-profile p.json", {WATCHES}),
        (True, "", {WATCHES, STEERS}),
        (True, "--inject-profile p.json --skip-train", {WATCHES}),
    ],
)
def test_what_a_run_would_wrap_follows_its_flags(
    tmp_path, capsys, monkeypatch, steered, flags, parts
):
    monkeypatch.setattr(feature, "check_data_files", lambda args, facts: None)
    path = tmp_path / "recipe.yaml"
    path.write_text(UNTAUGHT if steered else "\n".join(UNTAUGHT.splitlines()[:3]))
    assert main(["plan", str(path), "--wraps", "--", *STUDENT.split(), *flags.split()]) == 0
    plan, _, wraps = capsys.readouterr().out.partition("\nwraps:\n")
    assert plan
    shown = {line.split("  ")[1] for line in wraps.splitlines()}
    assert "every run" in shown
    assert shown & {WATCHES, STEERS} == parts


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--inject-set", "objective.alpha=-1"], "--inject-set objective.alpha=-1: objective.alph"),
        (["--", *STUDENT.split(), "--moe-layer-freq", "2"], "{path}: domains[0].experts.layers.3"),
        (["--", *STUDENT.split()], "{path}: teachers.coder.source: 'hf:/models/coder'"),
        (["--", "--num-layers", "x"], "Megatron flags: argument --num-layers: invalid int"),
        (
            ["--", *STUDENT.split(), "--inject-recipe", "x"],
            "--inject-recipe: the recipe is already",
        ),
        (["--", *STUDENT.split(), "--inject-alpha", "1"], "--inject-alpha: cannot be combined"),
    ],
)
def test_mistakes_are_one_line_and_status_2(recipe_file, capsys, arguments, expected):
    assert main(["plan", recipe_file, *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("moe-inject: " + expected.format(path=recipe_file))
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--data-path 8 {0}/en 1 {0}/none", "--data-path: '{0}/none' has no {0}/none.bin, "),
        ("--data-path {0}/half", "--data-path: '{0}/half' has no {0}/half.idx; correct"),
        ("--data-path {0}/en.bin", "without its ending, as in '{0}/en'"),
        ("--train-data-path {0}/en --valid-data-path {0}/no", "--valid-data-path: '{0}/no' has"),
        ("--data-path {0}/chat.jsonl --sft", None),
        ("--data-path {0}/en --sft", "--data-path: '{0}/en' has no {0}/en; correct"),
        ("--data-path s3://bucket/en", None),
        ("--data-path {0}/x --dataloader-type external", None),
        ("--mock-data", None),
        ("--data-path 8 {0}/en 1 {0}/en", None),
    ],
)
def test_the_files_of_the_data_are_looked_for(tmp_path, flags, message):
    for name in ("en.bin", "en.idx", "half.bin", "chat.jsonl"):
        (tmp_path / name).touch()
    parser = ArgumentParser()
    add_megatron_arguments(parser)
    args = parser.parse_args(["--num-layers", "2", *flags.format(tmp_path).split()])
    facts = student_facts_from_args(args)
    if message is None:
        check_data_files(args, facts)
    else:
        with pytest.raises(RecipeError) as error:
            check_data_files(args, facts)
        assert message.format(tmp_path) in str(error.value)


def test_megatron_flags_stand_behind_two_dashes(recipe_file, capsys):
    assert main(["plan", recipe_file, "--num-layers", "8", "--bf16"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--num-layers, 8, --bf16: not known here; put -- before the Megatron flags" in error
    with pytest.raises(SystemExit):
        main(["plan", "--help"])
    assert "RECIPE [-- MEGATRON FLAGS]" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["schema", "--num-layers", "8"])
    assert "unrecognized arguments: --num-layers 8" in capsys.readouterr().err


def test_help_with_megatron_flags(recipe_file, capsys):
    """Some release has a help text with a per cent sign, which argparse does not print."""
    with pytest.raises(SystemExit) as done:
        main(["plan", recipe_file, "--", "--help"])
    assert done.value.code == 0
    assert "--inject-recipe" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["evaluate", "profile"])
def test_what_only_evaluates_is_checked_before_it_starts(recipe_file, tmp_path, capsys, command):
    def run(output, *flags):
        assert main([command, recipe_file, "--output", str(output), "--", *flags]) == 2
        return capsys.readouterr().err

    (tmp_path / "file").touch()
    output = tmp_path / "file" / "o.json"
    assert f"--output: {output} cannot be written (File exists)" in run(output)
    assert "--cpu: is no flag of Megatron's; put it before --" in run(output, "--bf16", "--cpu")


STUDENT_ALONE = "domains: [{name: code, data: [1]}]\nobjective: {alpha: 0, beta: 1}\n"
STUDENT_ALONE += "train: {experts: all}\n"


@pytest.mark.parametrize(
    ("more", "flags", "code", "said"),
    [
        ("", "--load /typo/student", 2, "--load /typo/student holds no checkpoint"),
        ("", "", 0, "no --load: training needs the student's checkpoint"),
        ("mixing: {general: 0.5}", "", 2, "mixing: general has 80.0% of the training blend"),
        ("mixing: {general: 0.8}", "", 0, "moe-inject plan"),
        ("mixing: {general: {points: {0: 0.1, 9: 0.5}}}", "", 0, "moe-inject plan"),
        ("evaluation: {}", "", 0, "training needs it: evaluation.file: missing"),
        ("evaluation: {}", "", 0, "add --save, or name a file with evaluation.file"),
        ("evaluation: {}", "--save /save", 0, "into the --save folder"),
    ],
)
def test_a_plan_finds_what_training_would_refuse(tmp_path, capsys, more, flags, code, said):
    for name in ("en.bin", "en.idx", "code.bin", "code.idx"):
        (tmp_path / name).touch()
    path = tmp_path / "recipe.yaml"
    path.write_text(STUDENT_ALONE + more)
    data = f"--data-path 8 {tmp_path}/en 2 {tmp_path}/code --split 1,0,0"
    given = f"--num-layers 2 --num-experts 4 {data} {flags}"
    assert main(["plan", str(path), "--", *given.split()]) == code
    told = capsys.readouterr()
    assert said in (told.err if code else told.out)
    if "evaluation" in more and "--save" in flags:
        assert "missing" not in told.out


@pytest.mark.parametrize("rank", [0, 1])
def test_training_looks_for_its_data_before_it_begins(tmp_path, rank):
    """On the first rank: not every rank reads data."""
    parser = ArgumentParser()
    add_megatron_arguments(parser)
    args = parser.parse_args(["--num-layers", "2", "--data-path", f"{tmp_path}/none"])
    args.rank = rank
    run = SimpleNamespace(args=args, facts=student_facts_from_args(args))
    parquet = dataclasses.replace(run.facts, data_paths={"train": (str(tmp_path),)})
    feature.DataFiles().start(SimpleNamespace(args=args, facts=parquet))  # its script's own format
    if rank:
        assert feature.DataFiles().start(run) is None
    else:
        with pytest.raises(RecipeError, match=r"--data-path: .*none' has no "):
            feature.DataFiles().start(run)


def test_missing_file(capsys):
    assert main(["plan", "/no/such.yaml"]) == 2
    assert "/no/such.yaml" in capsys.readouterr().err


def test_version_and_usage(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--version"])
    assert done.value.code == 0
    assert capsys.readouterr().out == f"moe-inject {__version__}\n"
    for arguments in ([], ["profile"], ["plan"]):
        with pytest.raises(SystemExit) as done:
            main(arguments)
        assert done.value.code == 2


def test_rows_of_a_built_model():
    facts = StudentFacts(
        num_layers=8,
        num_moe_experts=16,
        moe_layers=tuple(range(8)),
        data_paths={"train": ("/d/en", "/d/code", "/d/math")},
        parallel=ParallelFacts(tp=2, pp=2, vpp=2, ep=2),
    )
    recipe = recipe_from_yaml(RECIPE)
    rows = [
        ParameterRow("experts", 2_000_000, 98_000_000, [2_000_000, 0]),
        ParameterRow("router", 4096, 0, [2048, 2048]),
    ]
    teachers = {
        "coder": (
            "hf (LlamaForCausalLM)",
            count(1_234_567),
            memory_text(3 << 20),
            "last stage",
        )
    }
    plan = Plan(
        recipe,
        facts,
        {"trains": parameter_table(rows), **teacher_lines(recipe, teachers)},
        ["something odd"],
    )
    lines = render_plan(plan).splitlines()
    for line in (
        "  component  trained  frozen  trained per rank",
        "  experts     2.00 M  98.0 M  0 to 2.00 M (nothing on 1 of 2 ranks)",
        "  router      4.10 k       0  2.05 k",
        "  total       2.00 M  98.0 M  2.05 k to 2.00 M",
        "  coder    hf:/models/coder  hf (LlamaForCausalLM)  1.23 M      3.0 MiB  last stage",
        "  layout: TP=2 PP=2 VPP=2 EP=2",
        "  something odd",
    ):
        assert line in lines, line


def test_terms_of_the_loss_with_their_schedules_and_options():
    options = [
        "objective.gamma=10",
        "objective.divergence=jsd",
        "objective.confidence=entropy",
        "objective.skip_worse=true",
        "objective.alpha={points: {0: 0.1, 100: 1.0}}",
        "objective.general_beta=0",
    ]
    lines = render_plan(Plan(recipe_from_yaml(RECIPE, options))).splitlines()
    alpha = "linear(0: 0.1, 100: 1)"
    assert any(
        line.startswith(f"  code       =  {alpha} * ")
        and "confidence[entropy] * jsd[0.5](coder || student" in line
        for line in lines
    ), lines
    assert "  (general)  =  10 * KL(original || student)" in lines
    assert any(line.startswith("  (general)  (the original)") for line in lines)
    assert any("no distillation where the teacher predicts the label worse" in x for x in lines)


def test_evaluation_is_told_where_it_is_on(recipe_file, capsys):
    main(["plan", str(recipe_file)])
    assert "evaluation" not in capsys.readouterr().out
    main(["plan", str(recipe_file), "--inject-set", "evaluation.gate=false"])
    text = capsys.readouterr().out
    assert "into the --save folder" in text
    assert "no teacher gate" in text


def test_what_imitates_what():
    options = ["imitation.hidden=0.1", "imitation.experts=2"]
    recipe = recipe_from_yaml(RECIPE, options)
    terms = [
        ImitationTerm("hidden", "coder", 3, 1, {0: 1.0}),
        ImitationTerm("experts", "coder", 12, 7, {0: 1.0}, frozenset({4, 5, 6})),
    ]
    text = render_plan(Plan(recipe, lines={"imitation": imitation_lines(terms)}))
    assert "0.1 * normalized(hidden states, coder) + 2 * normalized(expert outputs, coder)" in text
    assert "            3  hidden       coder                1" in text
    assert "           12  experts 4-6  coder                7" in text
    assert "student layer" not in render_plan(Plan(recipe))


def test_long_choices_are_summarised():
    layers = {layer: [0, 1] for layer in range(40)}
    text = RECIPE.replace("{3: [0, 5], 4: [1, 2, 3]}", str(layers))
    lines = render_plan(Plan(recipe_from_yaml(text))).splitlines()
    assert "  code    16-39  48 in all" in lines
    assert len([line for line in lines if line.startswith("  code ")]) == 19


@pytest.mark.parametrize(
    ("overrides", "warning"),
    [
        (["objective.alpha=0"], "alpha is 0: teachers run for the reported losses only"),
        (["train.experts=none"], "train.experts is none"),
        (["objective.general_beta=0"], "general tokens have no loss"),
        ([], "code and math share experts (layer 3: 5)"),
    ],
)
def test_warnings(overrides, warning):
    warnings = recipe_warnings(recipe_from_yaml(RECIPE, overrides))
    assert any(found.startswith(warning) for found in warnings)


def test_no_warning_without_reason():
    overrides = ["domains[1].experts.layers={5: [1]}"]
    assert recipe_warnings(recipe_from_yaml(RECIPE, overrides)) == []


def test_units():
    assert [count(n) for n in (0, 999, 1000, 12_345_678, 671_000_000_000, 10**15)] == [
        *("0", "999", "1.00 k", "12.3 M", "671 B", "1000 T"),
    ]
    assert [memory_text(n) for n in (0, 1023, 1024, 3 << 30, 5 << 40)] == [
        *("0 B", "1023 B", "1.0 KiB", "3.0 GiB", "5.0 TiB"),
    ]
