"""Finite but absurd numbers are one error at start; at the bounds all losses are finite."""

import pytest
import torch

from megatron_moe_inject.losses import (
    KINDS,
    Dense,
    Divergence,
    Student,
    TermWeights,
    fused_loss,
)
from megatron_moe_inject.recipe.load import recipe_from_yaml
from megatron_moe_inject.recipe.numbers import MIXTURES, TEMPERATURES, WEIGHTS
from tests.harness.recipes import message_of, text_with

COMMITTEE = {"coder": 1e308, "prose": 1e308}
TEACHERS = {"coder": {"source": "hf:/a"}, "prose": {"source": "hf:/b"}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective.temperature": 1e200}, "objective.temperature: 1e+200 is too large for a"),
        ({"objective.temperature": 1e-40}, "objective.temperature: 1e-40 is too small for a"),
        ({"teachers.coder.temperature": 1e200}, "teachers.coder.temperature: 1e+200 is too large"),
        ({"domains.0.temperature": 1e-40}, "domains[0].temperature: 1e-40 is too small"),
        ({"objective.alpha": 1e39}, "objective.alpha: 1e+39 is too large"),
        ({"domains.1.beta": 1e39}, "domains[1].beta: 1e+39 is too large"),
        ({"objective.gamma": 1e-40}, "objective.gamma: 1e-40 is too small"),
        ({"objective.alpha": {"points": {0: 0, 9: 1e39}}}, "objective.alpha.points.9: 1e+39 is"),
        ({"retention.l2": 1e300}, "retention.l2: 1e+300 is too large"),
        ({"steering.coeff": {"points": {3: 1e-50}}}, "steering.coeff.points.3: 1e-50 is too small"),
        ({"steering.bias_counts": 1e-40}, "steering.bias_counts: 1e-40 is too small"),
        ({"steering.target_mass": 1e-40}, "steering.target_mass: 1e-40 is too small"),
        ({"objective.skew": 1e-40}, "objective.skew: 1e-40 is too small"),
        ({"objective.jsd_beta": 1 - 1e-9}, "objective.jsd_beta: 0.999999999 is too large"),
        ({"mixing.code": 1e-300}, "mixing.code: 1e-300 is too small"),
        (
            {"domains.0.teacher": COMMITTEE, "teachers": TEACHERS},
            "domains[0].teacher.coder: 1e+308 is too large",
        ),
        ({"evaluation.file": "/"}, "evaluation.file: '/' is no file; name one"),
        ({"evaluation.file": "runs/"}, "evaluation.file: 'runs/' is no file"),
        ({"evaluation.file": ".."}, "evaluation.file: '..' is no file"),
        ({"evaluation.file": "a\0b"}, "evaluation.file: 'a\\x00b' is no file"),
    ],
)
def test_absurd_values_are_one_error(changes, message):
    found = message_of(lambda: recipe_from_yaml(text_with(changes)))
    assert found.startswith(message), found
    assert "write " in found or "name " in found


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"evaluation": True}, ["evaluation: True is not a mapping or null", "{gate: true}"]),
        ({"train": "all"}, ["train: 'all' is not a mapping", "write train: {experts: selected}"]),
        ({"steering": 0.1}, ["steering: 0.1 is not a mapping; write steering: {coeff: 0.0}, or"]),
        ({"teachers.coder": "hf:/x"}, ["teachers.coder: 'hf:/x'", "write coder: {source: ...}"]),
        ({"domains.0": "code"}, ["domains[0]: 'code'", "write {name: ..., data: ...}"]),
        ({"domains.0.experts": [3]}, ["[3] is not a", '{layers: {3: [0, 5]}}, or "3:0,5"']),
        ({"objective.alpha": "x"}, ["'x' is not a number or a schedule; write alpha: 0.5, or {po"]),
        ({"imitation": 1}, ["imitation: 1 is not a mapping; write imitation: {"]),
    ],
)
def test_a_section_that_is_none_says_what_it_takes(changes, parts):
    message = message_of(lambda: recipe_from_yaml(text_with(changes)))
    for part in parts:
        assert part in message, message
    assert "spec" not in message.lower()


@pytest.mark.parametrize("temperature", TEMPERATURES)
@pytest.mark.parametrize("kind", KINDS)
def test_at_the_bounds_everything_is_finite(kind, temperature):
    """With Megatron's largest loss scale on top."""
    generator = torch.Generator().manual_seed(0)
    t, h, v = 9, 8, 33

    def tensor(*shape):
        return torch.randn(*shape, generator=generator) * 3

    labels = torch.randint(v, (t,), generator=generator)
    for weight in (WEIGHTS[1], WEIGHTS[0]):
        for mixture in MIXTURES if kind in ("jsd", "skew_kl") else (None,):
            hidden, head = tensor(t, h).requires_grad_(), tensor(v, h).requires_grad_()
            divergence = {} if mixture is None else {_MIXTURE[kind]: mixture}
            loss = fused_loss(
                Student(hidden, head, labels),
                Dense(tensor(t, h), tensor(v, h)),
                TermWeights(weight, weight, Divergence(kind, **divergence), temperature),
            )
            (loss.total.sum() * 2.0**32).backward()
            for name, found in (("loss", loss.total), ("x", hidden.grad), ("head", head.grad)):
                assert found.isfinite().all(), name
            assert hidden.grad.any()


_MIXTURE = {"jsd": "beta", "skew_kl": "skew"}
