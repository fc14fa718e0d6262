"""Feature losses against references, and imitation in a small model against plain autograd."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_moe_inject.host.attached_loss import (
    attach_loss,
    take_terms,
)
from megatron_moe_inject.losses import reference
from megatron_moe_inject.losses.features import (
    FEATURE_LOSSES,
    feature_loss,
    proportional_layer,
)
from megatron_moe_inject.teachers.imitation.exchange import FeatureExchange, LayerStates
from megatron_moe_inject.teachers.imitation.hook import ImitationHook
from megatron_moe_inject.teachers.imitation.projections import Projections
from megatron_moe_inject.teachers.imitation.terms import ImitationTerm
from tests.harness.steps import step_of


def random(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("kind", FEATURE_LOSSES)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e3])
def test_value_and_gradient_are_the_reference(kind, scale):
    x, y = scale * random(0, 5, 3, 8), scale * random(1, 5, 3, 8)
    ours, plain = x.clone().requires_grad_(), x.double().requires_grad_()
    loss, expected = (
        feature_loss(ours, y, kind),
        reference.feature_loss(plain, y.double(), kind=kind),
    )
    upstream = random(2, 5, 3)
    loss.backward(upstream)
    expected.backward(upstream.double())
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-7)
    error = (ours.grad.double() - plain.grad).abs().max()
    assert error <= 1e-5 * plain.grad.abs().max()


@pytest.mark.parametrize("kind", FEATURE_LOSSES)
def test_reference_gradient(kind):
    x, y = random(0, 4, 6, dtype=torch.float64), random(1, 4, 6, dtype=torch.float64)
    assert torch.autograd.gradcheck(
        lambda s: reference.feature_loss(s, y, kind=kind), (x.requires_grad_(),)
    )


@pytest.mark.parametrize("kind", FEATURE_LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_float32(kind, dtype):
    x, y = random(0, 7, 64, dtype=dtype), random(1, 7, 64, dtype=dtype)
    loss = feature_loss(x.requires_grad_(), y, kind)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(
        loss.double(),
        reference.feature_loss(x.double(), y.double(), kind=kind),
        rtol=1e-5,
        atol=1e-6,
    )
    loss.sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.parametrize("kind", FEATURE_LOSSES)
def test_zero_states_give_finite_losses_and_gradients(kind):
    for x, y in ((torch.zeros(2, 4), random(1, 2, 4)), (random(1, 2, 4), torch.zeros(2, 4))):
        x = x.clone().requires_grad_()
        loss = feature_loss(x, y, kind)
        (0.0 * loss).sum().backward()
        assert loss.isfinite().all()
        assert (x.grad == 0).all()
    assert (feature_loss(torch.zeros(1, 4), torch.ones(1, 4), "cosine") == 1).all()


@settings(max_examples=50)
@given(st.integers(0, 10**6), st.floats(0.01, 100), st.sampled_from(FEATURE_LOSSES))
def test_what_each_loss_is_blind_to(seed, factor, kind):
    x, y = random(seed, 3, 16), random(seed + 1, 3, 16)
    assert (feature_loss(y, y, kind).abs() < 1e-5).all()
    loss = feature_loss(x, y, kind)
    if kind == "cosine":
        torch.testing.assert_close(feature_loss(factor * x, y, kind), loss, rtol=1e-3, atol=1e-5)
    power = 2 if kind == "mse" else 0
    torch.testing.assert_close(
        feature_loss(factor * x, factor * y, kind), factor**power * loss, rtol=1e-3, atol=1e-5
    )


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"l2.*mse, cosine, normalized"):
        feature_loss(torch.zeros(1), torch.zeros(1), "l2")
    with pytest.raises(ValueError, match=r"\[2\] and teacher \[3\] differ"):
        feature_loss(torch.zeros(2), torch.zeros(3), "mse")


def test_attached_loss_joins_the_backward_pass():
    x, w = random(0, 4).requires_grad_(), random(1, 4).requires_grad_()
    state = attach_loss(2 * x, (w * x).sum(), torch.tensor(0.5))
    assert torch.equal(state, 2 * x)
    (3 * state).sum().backward()
    torch.testing.assert_close(x.grad, 6 + 0.5 * w.detach())
    torch.testing.assert_close(w.grad, 0.5 * x.detach())


@pytest.mark.parametrize(
    ("student", "layers", "teacher_layers", "expected"),
    [
        (0, 4, 2, 0),
        (1, 4, 2, 0),
        (2, 4, 2, 1),
        (3, 4, 2, 1),
        (0, 2, 12, 5),
        (1, 2, 12, 11),
        (0, 61, 4, 0),
    ],
)
def test_proportional_layers(student, layers, teacher_layers, expected):
    assert proportional_layer(student, layers, teacher_layers) == expected


@given(st.integers(1, 80), st.integers(1, 80))
def test_proportional_layers_rise_to_the_last(layers, teacher_layers):
    found = [proportional_layer(i, layers, teacher_layers) for i in range(layers)]
    assert found == sorted(found)
    assert found[0] >= 0
    assert found[-1] == teacher_layers - 1


class Alone:
    """A process group of this rank."""

    def rank(self):
        return 0

    def size(self):
        return 1


class Layer(torch.nn.Module):
    def __init__(self, number):
        super().__init__()
        self.layer_number = number
        self.linear = torch.nn.Linear(6, 6)

    def forward(self, hidden):
        return hidden + torch.tanh(self.linear(hidden)), None


class Chunk(torch.nn.Module):
    """Three layers; ``recompute`` runs them the way Megatron's full recompute does."""

    def __init__(self, recompute, per_token):
        super().__init__()
        torch.manual_seed(5)
        self.config = SimpleNamespace(
            sequence_parallel=False,
            grad_scale_func=lambda loss: 8 * loss,
            calculate_per_token_loss=per_token,
        )
        self.decoder = torch.nn.Module()
        self.decoder.layers = torch.nn.ModuleList(Layer(i + 1) for i in range(3))
        self.recompute = recompute

    def run(self, hidden):
        for layer in self.decoder.layers:
            hidden, _ = layer(hidden)
        return hidden

    def forward(self, hidden):
        if self.recompute:
            return torch.utils.checkpoint.checkpoint(self.run, hidden, use_reentrant=True)
        return self.run(hidden)


class Pass:
    """A teacher that has run: layers 0 and 4 of width 5."""

    def __init__(self, rows):
        self.rows = rows

    def take_layer(self, layer):
        return random(100 + layer, self.rows, 4, 5)

    def readable(self, micro_batch=None):
        return None


LABELS = torch.tensor([[-1, 0], [0, 1], [-1, -1], [1, 0]])
MASK = (random(3, 4, 2, 4) > -0.5).float()
TERMS = (
    ImitationTerm("hidden", "coder", 0, 0, {0: 0.5, 1: 0.5}),
    ImitationTerm("hidden", "coder", 2, 4, {0: 0.5, 1: 0.5}),
)


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
@pytest.mark.parametrize("per_token", [False, True], ids=["mean", "per token"])
@pytest.mark.parametrize("kind", FEATURE_LOSSES)
def test_gradients_of_a_model_are_those_of_plain_autograd(kind, recompute, per_token):
    """Two domains and general samples mixed, one micro-batch without a domain, in 1F1B order."""
    chunk = Chunk(recompute, per_token)
    groups = SimpleNamespace(tp=Alone(), pp=Alone(), cp=Alone(), mp=Alone())
    projections = Projections(
        TERMS, {"coder": 5}, hidden_size=6, like=torch.zeros(()), seed=1, sequence_parallel=False,
        tp_group=groups.tp,
    )  # fmt: skip
    wishes = [LayerStates("coder", 0), LayerStates("coder", 4)]
    exchange = FeatureExchange(
        [wishes], widths={"coder": 5}, dtypes={"coder": torch.float32}, groups=groups,
        sequence_parallel=False, device=torch.device("cpu"),
    )  # fmt: skip
    teachers = SimpleNamespace(passes={"coder": Pass(5)})
    hook = ImitationHook(
        [chunk], [projections], TERMS, exchange, teachers, taught={"coder": [0, 1]},
        weights_at=lambda iteration: {"hidden": 0.1 * iteration}, loss=kind,
        domains=["code", "law"], by_domain=True, groups=groups,
    )  # fmt: skip
    inputs = [random(20 + i, 4, 2, 6).requires_grad_() for i in range(4)]
    batches = [{"loss_mask": mask} for mask in MASK]

    step = step_of(batches, labels=LABELS, iteration=3)
    hook.begin(step)
    outputs = []
    for i in range(4):  # one micro-batch ahead, as between pipeline stages
        outputs.append(chunk(inputs[i]))
        if i:
            outputs[i - 1].square().sum().backward()
    outputs[3].square().sum().backward()
    reports = [{"lm loss": torch.zeros(2)} for _ in range(4)]
    hook.end(step, reports)
    found = [p.grad.clone() for p in (*chunk.parameters(), *projections.parameters(), *inputs)]

    for parameter in (*chunk.parameters(), *projections.parameters(), *inputs):
        parameter.grad = None
    total, sums, row = 0.0, {0: [0.0, 0.0], 1: [0.0, 0.0]}, 0
    for i in range(4):
        hidden = inputs[i]
        states = []
        for layer in chunk.decoder.layers:
            hidden, _ = layer(hidden)
            states.append(hidden)
        total = total + hidden.square().sum()
        count = 1 if per_token else max(float(MASK[i].sum()), 1) * 4
        for b in range(2):
            domain = int(LABELS[i, b])
            if domain < 0:
                continue
            for term in TERMS:
                own = projections[term.projection](states[term.layer][:, b])
                target = random(100 + term.teacher_layer, 5, 4, 5)[row]
                losses = reference.feature_loss(own, target, kind=kind) * MASK[i, b]
                total = total + 8 * 0.3 * 0.5 * losses.sum() / count
                sums[domain][0] += float(losses.sum())
                sums[domain][1] += float(MASK[i, b].sum())
            row += 1
    total.backward()
    expected = [p.grad for p in (*chunk.parameters(), *projections.parameters(), *inputs)]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    reported = dict(zip(*take_terms(reports), strict=True))
    for index, name in enumerate(("code", "law")):
        values = reported[f"imitation loss/{name}"]
        torch.testing.assert_close(values, torch.tensor(sums[index]), rtol=1e-4, atol=1e-6)
        assert torch.equal(reported[f"feature loss/{name}"], values)  # as in version 0.1
    assert row == 5


def test_outside_a_step_nothing_is_attached():
    chunk = Chunk(False, False)
    groups = SimpleNamespace(tp=Alone(), pp=Alone(), cp=Alone(), mp=Alone())
    before = chunk(torch.ones(4, 2, 6))
    projections = Projections(
        TERMS, {"coder": 5}, hidden_size=6, like=torch.zeros(()), seed=1, sequence_parallel=True,
        tp_group=groups.tp,
    )  # fmt: skip
    ImitationHook(
        [chunk], [projections], TERMS, None, None,
        taught={"coder": [0, 1]}, weights_at=dict, loss="mse",
        domains=["code", "law"], by_domain=True, groups=groups,
    )  # fmt: skip
    assert torch.equal(chunk(torch.ones(4, 2, 6)), before)
    assert all(p.sequence_parallel for p in projections.parameters())


def test_projections_start_alike_everywhere_and_only_where_widths_differ():
    def make(terms, seed=1, width=5):
        state = torch.get_rng_state()
        made = Projections(
            terms, {"coder": width}, hidden_size=6, like=torch.zeros((), dtype=torch.bfloat16),
            seed=seed, sequence_parallel=False, tp_group=Alone(),
        )  # fmt: skip
        assert torch.equal(torch.get_rng_state(), state)
        return made

    both, last = make(TERMS), make(TERMS[1:])
    assert list(both) == ["hidden_0_coder", "hidden_2_coder"]
    assert torch.equal(both["hidden_2_coder"].weight, last["hidden_2_coder"].weight)
    assert not torch.equal(both["hidden_0_coder"].weight, both["hidden_2_coder"].weight)
    assert not torch.equal(
        make(TERMS, seed=2)["hidden_0_coder"].weight, both["hidden_0_coder"].weight
    )
    assert both["hidden_0_coder"].weight.dtype == torch.bfloat16
    assert len(make(TERMS, width=6)) == 0
