"""Feature and expert-output imitation through the real ``pretrain()``.

Layers 2 and 3 of the student imitate layers 0 and 1 of a wider teacher, through projections. With
two pipeline stages layer 1, on the first stage, does so too: expert 1 of it trains there.
"""

import pytest

from megatron_moe_inject.host.torch_dist import stored_shapes
from tests.harness import lane
from tests.harness.injection import LAYOUTS, OTHER, inject, recipe_file
from tests.harness.material import EVALUATES, make_material, student_flags
from tests.harness.training_recipes import FEATURES

TERMS = (
    "lm loss",
    "kd loss",
    "imitation loss",
    "imitation loss/code",
    "expert imitation loss",
    "total loss",
    "grad norm",
)


@pytest.fixture(scope="module")
def single(material):
    return inject(material, FEATURES, extra=EVALUATES)


def test_both_losses_are_reported_and_fall(material):
    more = ("--train-iters", "16", *lane.ONE_BATCH)
    imitating = inject(
        material, FEATURES.replace("0.5, experts: 0.25", "3.0, experts: 3.0"), extra=more
    )
    for name in ("imitation loss", "expert imitation loss"):
        values = imitating.losses(name)
        assert values[-1] < 0.8 * values[0], (name, values)
        assert imitating.losses(f"{name}/code") == values


def test_the_student_itself_moves_towards_the_teacher(material, single):
    """Not the projection alone: expert 3 of layer 3 ends elsewhere than without imitation."""
    plain = inject(material, FEATURES.replace("0.5, experts: 0.25", "0.0"))
    assert plain.losses("lm loss")[0] == single.losses("lm loss")[0]
    assert plain.losses("grad norm")[0] != single.losses("grad norm")[0]
    assert plain.losses("lm loss")[1:] != single.losses("lm loss")[1:]


def test_the_curve_does_not_depend_on_the_dispatcher(material, single):
    extra = ("--moe-token-dispatcher-type", "allgather")
    run = inject(material, FEATURES, nproc=2, ep=2, extra=extra)
    for term in TERMS:
        assert run.losses(term) == pytest.approx(single.losses(term), rel=2e-5), term


TWO = """
domains:
  - {{name: code, data: [1], teacher: coder, experts: {{layers: {{2: [3], 3: [0, 3]}}}}}}
  - {{name: text, data: [0], teacher: reader, experts: {{layers: {{1: [2], 3: [1]}}}}}}
teachers:
  coder: {{source: "megatron:{teacher}", layers: {{3: 1}}}}
  reader: {{source: "megatron:{teacher}"}}
imitation: {{hidden: {{points: {{0: 0.0, 2: 0.5}}}}, experts: 0.5, loss: cosine}}
"""


@pytest.fixture(scope="module")
def two(material):
    return inject(material, TWO)


@pytest.mark.parametrize(
    "layout",
    [
        "ep2",
        "pp2",
        *(pytest.param(at, marks=pytest.mark.slow) for at in ("tp2-sp", "full recompute")),
    ],
)
def test_two_domains_with_teachers_layers_and_experts_of_their_own(material, two, layout):
    names = ("imitation loss", "expert imitation loss")
    terms = ["lm loss", "grad norm", *names]
    terms += [f"{name}/{domain}" for name in names for domain in ("code", "text")]
    run = inject(material, TWO, **LAYOUTS[layout])
    for term in terms:
        assert run.losses(term) == pytest.approx(two.losses(term), rel=2e-5), term
        assert len(set(two.losses(term))) == 4, term


def test_evaluation_reports_them_too(single):
    assert single.evaluations[-1]["imitation loss"] > 0
    assert single.evaluations[-1]["expert imitation loss"] > 0


def test_the_checkpoint_is_one_for_plain_megatron(material, tmp_path):
    """Which trains on with the weights that imitation left, and drops the projections."""
    save, on = tmp_path / "done", tmp_path / "on"
    keep = ("--save-interval", "100", "--save")
    inject(material, FEATURES, nproc=2, pp=2, extra=(*keep, str(save)))
    flags = ("--train-iters", "5", *material.blend, "--no-load-optim", "--no-load-rng", "--load")
    plain = lane.run(student_flags(*flags, str(save), *keep, str(on)))
    untouched = lane.run(student_flags(*flags, material.student))
    assert plain.iterations[0]["iteration"] == 5
    assert plain.losses("lm loss")[0] != pytest.approx(untouched.losses("lm loss")[0], rel=1e-4)
    prefix = "inject_projections."
    assert len(stored_shapes(save / "iter_0000004", prefix)) == 4
    assert not stored_shapes(on / "iter_0000005", prefix)


def _fails(material, message, recipe=FEATURES, flags=None, **options):
    if flags is None:
        run = inject(material, recipe, check=False, **options)
    else:
        run = lane.run(flags, check=False)
    assert run.returncode == 2, run.tail()
    assert message in run.output
    assert "Traceback" not in run.output


def test_a_resumed_run_with_other_layers_is_told(material, tmp_path):
    save = str(tmp_path / "resumed")
    keep = ("--train-iters", "6", "--save", save, "--save-interval", "3")
    inject(material, FEATURES, extra=(*keep, "--exit-interval", "3"))
    ours = ("--inject-recipe", recipe_file(material, FEATURES), "--load", save)
    other = ("--inject-set", "teachers.coder.layers={3: 1}")
    flags = student_flags(*material.blend, *keep, *ours, *other)
    _fails(material, "holds projections inject_projections.experts_1_coder.weight", flags=flags)


def test_imitation_that_begins_in_a_resumed_run_needs_a_fresh_optimizer(material, tmp_path):
    save = str(tmp_path / "resumed")
    keep = ("--train-iters", "4", "--save", save, "--save-interval", "2")
    inject(
        material,
        FEATURES.replace("0.5, experts: 0.25", "0.0"),
        extra=(*keep, "--exit-interval", "2"),
    )
    ours = ("--inject-recipe", recipe_file(material, FEATURES), "--load", save)
    flags = student_flags(*material.blend, *keep, *ours)
    _fails(material, "projection experts_1_coder", flags=flags)
    run = lane.run([*flags, "--no-load-optim"])
    assert "holds no projections, so they start anew" in run.output
    assert [step["iteration"] for step in run.iterations] == [3, 4]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("teachers.coder.layers={0: 0}", "layers [0] imitate a teacher, but nothing up to them"),
        ("teachers.coder.layers={4: 0}", "teachers.coder.layers: 4 is no layer of the student"),
        ("teachers.coder.layers={3: 2}", "teachers.coder.layers.3: 2 is no layer of the teacher"),
    ],
)
def test_layers_that_cannot_be(material, override, message):
    extra = ("--inject-set", override, "--inject-set", "imitation.experts=0")
    _fails(material, message, nproc=2, pp=2, extra=extra)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--moe-latent-size", "16"), "--moe-latent-size"),
        (
            ("--ckpt-format", "torch", "--save", "unused", "--save-interval", "9"),
            "--ckpt-format: 'torch' does not load",
        ),
    ],
    ids=str,
)
def test_megatron_options_that_cannot_be(material, flags, message):
    _fails(material, message, extra=flags)


def test_a_dense_student_under_plain_tensor_parallelism(material, tmp_path):
    """Without sequence parallelism every rank sees all tokens; none may count twice."""
    recipe = FEATURES.replace("experts: {{layers: {{1: [1], 3: [0, 3]}}}}", "")
    recipe = recipe.replace(", experts: 0.25", "") + "train: {{experts: none, mlp: true}}\n"
    ours = ("--inject-recipe", recipe_file(material, recipe), "--inject-verify-frozen")
    small = [f for f in lane.dense() if f != "--mock-data"]
    small += ["--vocab-size", "61", "--make-vocab-size-divisible-by", "16", *material.blend, *ours]
    start = str(tmp_path / "dense")
    lane.run([*small[: -len(ours)], "--train-iters", "1", "--save", start, "--save-interval", "9"])
    small += ["--load", start, "--finetune", "--no-load-optim", "--no-load-rng"]
    single = lane.run(small)
    split = lane.run([*small, "--tensor-model-parallel-size", "2"], nproc=2)
    for term in ("lm loss", "kd loss", "imitation loss", "grad norm"):
        assert split.losses(term) == pytest.approx(single.losses(term), rel=2e-5), term


@pytest.mark.slow
@pytest.mark.skipif(not OTHER, reason="MEGATRON_OTHER names no second Megatron-Core")
def test_the_other_supported_megatron_gives_the_same_curve(tmp_path, single):
    material = make_material(tmp_path, [OTHER])
    run = inject(material, FEATURES, nproc=2, pp=2, path=[OTHER])
    for term in TERMS:
        assert run.losses(term) == pytest.approx(single.losses(term), rel=2e-5), term
