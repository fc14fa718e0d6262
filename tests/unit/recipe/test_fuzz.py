"""Whatever is written in a recipe: it is a Recipe that survives a round trip, or a RecipeError."""

from dataclasses import asdict

import numpy as np
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.recipe.expert_choice import ExpertChoice
from megatron_moe_inject.recipe.load import dump_recipe, recipe_from_yaml
from megatron_moe_inject.recipe.rules import validate
from megatron_moe_inject.recipe.schedule import Schedule
from megatron_moe_inject.recipe.schema import Domain, Objective, Recipe, TeacherSpec, Train
from megatron_moe_inject.routing.section import STEERING, Steering
from tests.harness.recipes import text_with

names = st.from_regex(r"[A-Za-z_-][A-Za-z0-9_-]{0,8}", fullmatch=True).filter(
    lambda name: name != "general"
)
positive = st.floats(1e-12, 1e9)
weights = positive | st.sampled_from([0.0, 1.0])
temperatures = st.floats(1e-4, 1e4)
choices = st.dictionaries(
    st.integers(0, 90),
    st.lists(st.integers(0, 300), min_size=1, max_size=4, unique=True),
    min_size=1,
    max_size=4,
)


shares = st.floats(1e-6, 1)
limits = {
    "profile": st.just("profiles/p.json"),
    "domain": st.none() | names,
    "at_least": st.none() | st.just(0),
    "at_most": st.none() | st.integers(9, 99),
    "only_layers": st.lists(st.integers(0, 90), max_size=3, unique=True),
    "ep": st.none() | st.integers(1, 64),
}
scores = st.none() | st.sampled_from(["token", "gate", "contrast"])
expert_choices = st.one_of(
    st.builds(ExpertChoice, choices, origin=st.none() | names),
    st.builds(
        ExpertChoice,
        method=st.sampled_from(["token", "gate", "contrast"]),
        threshold=shares,
        **limits,
    ),
    st.builds(ExpertChoice, method=st.just("top_n"), n=st.integers(1, 9), score=scores, **limits),
    st.builds(
        ExpertChoice,
        method=st.just("budget"),
        budget=shares,
        budget_of=st.none() | st.sampled_from(["routed", "all"]),
        score=scores,
        **limits,
    ),
)

schedules = st.builds(
    Schedule,
    st.dictionaries(st.integers(0, 10**6), positive, min_size=1, max_size=4),
    st.sampled_from(["linear", "cosine"]),
)


@st.composite
def recipes(draw):
    prefixes = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12)
    entries = prefixes.filter(lambda entry: "${" not in entry and entry != "???")
    teachers = draw(st.lists(names, min_size=1, max_size=3, unique=True))
    data = draw(
        st.lists(st.integers(0, 50) | entries, min_size=len(teachers), max_size=9, unique=True)
    )
    domain_names = draw(
        st.lists(names, min_size=len(teachers), max_size=len(teachers), unique=True)
    )
    domains = [
        Domain(domain_names[i], data[i :: len(teachers)], teacher, draw(expert_choices))
        for i, teacher in enumerate(teachers)
    ]
    specs = {
        name: TeacherSpec(
            f"{draw(st.sampled_from(['megatron', 'hf']))}:/{name}",
            draw(st.none() | temperatures),
            draw(st.sampled_from(["params", "fp32", "bf16"])),
            draw(st.integers(0, 9)),
            prefix=draw(
                st.sampled_from(["auto", "none", "bos"])
                | st.lists(st.integers(0, 300_000), min_size=1, max_size=3)
            ),
        )
        for name in teachers
    }
    objective = Objective(
        draw(st.sampled_from(["forward_kl", "reverse_kl", "jsd", "skew_kl"])),
        draw(temperatures),
        draw(positive | schedules),
        draw(weights | schedules),
        draw(st.none() | weights | schedules),
        confidence=draw(st.sampled_from(["none", "label", "entropy"])),
        skip_worse=draw(st.booleans()),
        masked_sum=draw(st.booleans()),
        kernels=draw(st.sampled_from(["auto", "torch"])),
    )
    router = draw(st.booleans())
    train = Train(
        draw(st.sampled_from(["selected", "all"])),
        False,
        router,
        draw(st.booleans()) and not router,
        *draw(st.tuples(*[st.booleans()] * 6)),
    )
    steering = Steering(
        target_mass=draw(st.floats(0.01, 1)),
        balance=draw(weights | schedules),
        report=draw(st.booleans()),
        detail_every=draw(st.integers(0, 1000)),
    )
    sections = {STEERING.key: steering}
    frozen = draw(st.booleans())
    return Recipe(domains, specs, objective, train, verify_frozen=frozen, sections=sections)


@given(recipes())
@settings(max_examples=15, suppress_health_check=[HealthCheck.too_slow])
def test_round_trip(recipe):
    validate(recipe)
    assert recipe_from_yaml(dump_recipe(recipe)) == recipe


scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(14000, 15000).map(lambda bits: 2**bits)
    | st.floats()
    | st.text(max_size=6)
    | st.sampled_from(["${x}", "${", "???", "selected", "coder", "12:3", "megatron:/x"])
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(scalars, inner, max_size=3)
)
places = st.sampled_from(
    [
        *(
            "version",
            "domains",
            "domains.0",
            "domains.0.name",
            "domains.0.data",
            "domains.0.data.0",
        ),
        *("domains.0.teacher", "domains.0.experts", "domains.0.experts.layers", "verify_frozen"),
        *("domains.0.experts.profile", "domains.0.experts.method", "domains.0.experts.threshold"),
        *("domains.0.experts.n", "domains.0.experts.at_most", "domains.0.experts.only_layers"),
        *("domains.0.experts.layers.3", "domains.0.experts.layers.x", "teachers", "teachers.coder"),
        *("teachers.coder.source", "teachers.coder.window", "teachers.new", "objective", "train"),
        *("objective.alpha", "objective.general_beta", "objective.divergence", "train.experts"),
        *("train.router", "general_data", "surprise", "domains.0.surprise"),
        *("mixing", "mixing.general", "mixing.general.points.0", "mixing.code"),
    ]
)


def accepts_or_refuses(text, overrides=()):
    try:
        recipe = recipe_from_yaml(text, overrides)
    except RecipeError as error:
        recipe, message = None, str(error)
    if recipe is None:
        assert message
        assert "\n" not in message
        return
    validate(recipe)
    assert recipe_from_yaml(dump_recipe(recipe)) == recipe


@given(st.dictionaries(places, values, max_size=2))
@settings(max_examples=80)
def test_arbitrary_values_end_in_recipe_or_error(changes):
    try:
        text = text_with(changes)
    except (TypeError, AttributeError, IndexError, KeyError, ValueError):
        return  # the changes do not fit into one tree, or yaml cannot write them
    accepts_or_refuses(text)


numeric = st.sampled_from(
    [
        *("domains.0.alpha", "domains.0.beta", "domains.0.temperature", "domains.0.teacher.coder"),
        *("teachers.coder.temperature", "objective.temperature", "objective.alpha"),
        *("objective.alpha.points.0", "objective.beta.points.7", "objective.general_beta"),
        *("objective.gamma", "objective.ce_share", "objective.jsd_beta", "objective.skew"),
        *("imitation.hidden", "imitation.experts.points.0"),
        *("retention.experts", "retention.l2", "steering.coeff"),
        *("steering.target_mass", "steering.balance", "steering.bias_counts", "mixing.general"),
        *("mixing.code.points.0", "mixing.math"),
    ]
)
numbers = (
    st.floats()
    | st.floats(0, 1)
    | st.floats(-50, 309).map(lambda power: 10.0**power if power < 308 else 1e308)
    | st.sampled_from([1e200, 1e-40, 1e39, 1e308, 5e-324, 1 - 1e-16, 1e-7, 10**300, -0.0])
)


def numbers_of(plain):
    if isinstance(plain, dict):
        return [n for value in plain.values() for n in numbers_of(value)]
    if isinstance(plain, list):
        return [n for value in plain for n in numbers_of(value)]
    return [plain] if type(plain) is float else []


def in_float32(values):
    """Whether no product of these is more than float32 holds, and nothing above 0 becomes 0."""
    with np.errstate(all="ignore"):
        product = np.multiply.reduce(np.array(values, dtype=np.float32), dtype=np.float32)
    return np.isfinite(product) and (product >= np.finfo(np.float32).tiny or 0 in values)


@given(st.dictionaries(numeric, numbers, min_size=1, max_size=2))
@settings(max_examples=400)
def test_every_number_that_is_accepted_is_one_in_float32(changes):
    try:
        text = text_with(changes)
    except (TypeError, AttributeError):
        return  # the changes do not fit into one tree
    try:
        recipe = recipe_from_yaml(text)
    except RecipeError:
        return
    for number in numbers_of(asdict(recipe)):
        assert in_float32([number])
        assert number in (0, 1) or in_float32([abs(1 - number)]), number
    largest = 2.0**32 * 100 * 1e6  # a loss scale, nats and tokens of a step
    for domain in recipe.domains:
        temperature = recipe.temperature(domain)
        assert in_float32([1 / temperature, 1 / temperature])
        for weight in (recipe.alpha(domain), recipe.beta(domain), recipe.objective.gamma):
            for value in numbers_of(asdict(weight)) if isinstance(weight, Schedule) else [weight]:
                assert in_float32([value, temperature, temperature])
                assert in_float32([value, temperature, temperature, largest]) or not value
        shares = domain.teacher_weights.values()
        assert all(map(in_float32, ([share] for share in shares)))
        assert not shares or abs(sum(shares) - 1) < 1e-6


@given(st.text(max_size=60) | st.text("[]{}:,-&*!|>'\"%@`?# \nab1.$\t~", max_size=40))
@settings(max_examples=150)
def test_arbitrary_text_ends_in_recipe_or_error(text):
    accepts_or_refuses(text)


@given(places, st.text("[]{}:,-&*!'\"${}ab10.=\n", max_size=12) | st.text(max_size=8))
@settings(max_examples=60)
def test_arbitrary_overrides_end_in_recipe_or_error(key, raw):
    accepts_or_refuses(text_with({}), [f"{key}={raw}"])


@given(st.text(max_size=20))
@settings(max_examples=50)
def test_arbitrary_override_text_ends_in_recipe_or_error(override):
    accepts_or_refuses(text_with({}), [override])
