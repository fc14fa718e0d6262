"""A grouped linear layer to which all experts are frozen, and the gradients of those that train."""

import pytest
import torch

from megatron_moe_inject.experts.fp8 import weights as fp8_weights
from megatron_moe_inject.experts.train.grouped import train_some
from tests.harness.fp8_tensor import BlockwiseTensor

COUNTS = [3, 0, 2, 4, 1]
INPUTS, OUTPUTS = 6, 4


def normal(*shape, seed, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


class Product(torch.autograd.Function):
    """As TE's: the first weight alone decides whether there are weight gradients."""

    @staticmethod
    def forward(ctx, rows, counts, *weights):
        ctx.save_for_backward(rows, *weights)
        ctx.counts, ctx.wanted = counts, weights[0].requires_grad
        parts = zip(rows.split(counts), weights, strict=True)
        return torch.cat([part @ weight.t() for part, weight in parts])

    @staticmethod
    def backward(ctx, grad):
        rows, *weights = ctx.saved_tensors
        parts = list(zip(grad.split(ctx.counts), rows.split(ctx.counts), weights, strict=True))
        to_weights = [g.t() @ r if ctx.wanted else None for g, r, _ in parts]
        return torch.cat([g @ w for g, _, w in parts]), None, *to_weights


class Linear(torch.nn.Module):
    """``bias``: None, "added" inside or "returned"."""

    def __init__(self, trains, bias=None, dtype=torch.float64):
        super().__init__()
        self.num_gemms, self.asked, self.fails = len(COUNTS), [], False
        self.apply_bias, self.bias = bias == "added", bias
        for i in range(self.num_gemms):
            weight = normal(OUTPUTS, INPUTS, seed=i, dtype=dtype)
            self.register_parameter(f"weight{i}", torch.nn.Parameter(weight, i in trains))
            if bias:
                value = normal(OUTPUTS, seed=20 + i, dtype=dtype)
                self.register_parameter(f"bias{i}", torch.nn.Parameter(value, i in trains))

    def forward(self, x, m_splits):
        weights = [getattr(self, f"weight{i}") for i in range(self.num_gemms)]
        self.asked.append([weight.requires_grad for weight in weights])
        if self.fails:
            raise ZeroDivisionError
        out = Product.apply(x, m_splits, *weights)
        biases = [getattr(self, f"bias{i}") for i in range(self.num_gemms)] if self.bias else None
        if self.apply_bias:
            out = out + torch.cat([b.expand(n, -1) for n, b in zip(m_splits, biases, strict=True)])
        return out, biases if self.bias == "returned" else None


def experts(*trains, recomputed=False, **options):
    """A grouped MLP with one and the same kind of layer in both places."""
    mlp = torch.nn.Module()
    mlp.linear_fc1, mlp.linear_fc2 = Linear(trains, **options), Linear(trains, **options)
    mlp.activation_recompute = recomputed
    train_some(mlp)
    return mlp


def by_autograd(layer, rows, upstream):
    """Gradients by name, "rows" among them, with every parameter a leaf of a plain product."""
    leaves = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters()}
    leaves["rows"] = rows = rows.detach().clone().requires_grad_()
    total = 0
    for i, (part, up) in enumerate(zip(rows.split(COUNTS), upstream.split(COUNTS), strict=True)):
        out = part @ leaves[f"weight{i}"].t()
        total = total + ((out + leaves[f"bias{i}"] if layer.bias else out) * up).sum()
    return dict(zip(leaves, torch.autograd.grad(total, leaves.values()), strict=True))


@pytest.mark.parametrize("bias", [None, "added"])
@pytest.mark.parametrize("rows_train", [True, False])
@pytest.mark.parametrize("trains", [(0, 3), (1, 2), (4,)])
def test_gradients_of_what_trains_and_of_nothing_else(trains, rows_train, bias):
    layer = experts(*trains, bias=bias).linear_fc1
    rows = normal(sum(COUNTS), INPUTS, seed=30).requires_grad_(rows_train)
    upstream = normal(sum(COUNTS), OUTPUTS, seed=31)
    out, returned = layer(rows, COUNTS)
    assert returned is None
    (2 * out).backward(upstream)
    wanted = by_autograd(layer, rows, 2 * upstream)
    for name, parameter in layer.named_parameters():
        if int(name[-1]) in trains:
            torch.testing.assert_close(parameter.grad, wanted[name])
        else:
            assert parameter.grad is None, name
    if rows_train:
        torch.testing.assert_close(rows.grad, wanted["rows"])


def test_layers_that_train_in_part_are_found_one_by_one():
    """Patterns may choose one of an expert's two layers, or its biases alone."""
    for trains, names, changed in (
        (range(5), (), (False, False)),
        ((), (), (False, False)),
        ((), ("linear_fc2.weight3",), (False, True)),
        ((), ("linear_fc1.bias0",), (True, False)),
    ):
        mlp = torch.nn.Module()
        mlp.linear_fc1, mlp.linear_fc2 = Linear(trains, bias="added"), Linear(trains)
        for name, parameter in mlp.named_parameters():
            parameter.requires_grad_(parameter.requires_grad or name in names)
        assert train_some(mlp) == any(changed)
        for layer, own in zip((mlp.linear_fc1, mlp.linear_fc2), changed, strict=True):
            assert ("forward" in vars(layer)) == own
            out, _ = layer(normal(sum(COUNTS), INPUTS, seed=30), COUNTS)
            if own:
                out.sum().backward()
        found = {name for name, p in mlp.named_parameters() if p.grad is not None}
        assert found == set(names)
    assert not train_some(torch.nn.Linear(2, 2))


def test_biases_that_the_layer_returns_are_left_to_autograd():
    layer = experts(2, bias="returned").linear_fc2
    out, biases = layer(normal(sum(COUNTS), INPUTS, seed=30), COUNTS)
    assert [bias is layer._parameters[f"bias{i}"] for i, bias in enumerate(biases)] == [True] * 5
    (out.sum() + biases[2].sum()).backward()
    assert torch.equal(layer.bias2.grad, torch.ones(OUTPUTS, dtype=torch.float64))
    assert layer.weight2.grad is not None


def test_weights_are_read_after_all_pre_hooks():
    """One of DDP's waits for what the other ranks' optimizers made of them."""
    mlp = torch.nn.Module()
    mlp.linear_fc1, mlp.linear_fc2 = InFp8((1, 2)), InFp8((1, 2))
    train_some(mlp)
    layer = mlp.linear_fc2

    def gather(*_):
        layer._parameters["weight2"].data.fill_(3.0)

    layer.register_forward_pre_hook(gather)
    layer(normal(sum(COUNTS), INPUTS, seed=30, dtype=torch.bfloat16), COUNTS)
    assert (layer.multiplied[0][2].decoded() == 3).all()


def test_the_layer_sees_frozen_weights_and_keeps_its_parameters():
    layer = experts(0, 3).linear_fc1
    stock = dict(layer.named_parameters())
    rows = normal(sum(COUNTS), INPUTS, seed=30)
    layer(rows, COUNTS)
    layer.fails = True
    with pytest.raises(ZeroDivisionError):
        layer(rows, COUNTS)
    layer.fails = False
    with torch.no_grad():
        out, _ = layer(rows, COUNTS)
    assert out.grad_fn is None
    assert layer.asked[:2] == [[False] * 5] * 2
    assert not [name for name in vars(layer) if name.startswith("weight")]
    assert dict(layer.named_parameters()) == stock
    assert list(layer.state_dict()) == [f"weight{i}" for i in range(5)]
    assert [p.requires_grad for p in layer.parameters()] == [True, False, False, True, False]


@pytest.mark.parametrize("under_ddp", [True, False])
def test_gradients_accumulate_in_main_grad(under_ddp):
    """Two micro-batches; a product in bf16 is not rounded before it is added in float32."""
    layer = experts(0, 2, dtype=torch.bfloat16).linear_fc1
    layer.fuse_wgrad_accumulation = True
    weights = {0: layer.weight0, 2: layer.weight2}
    for weight in weights.values():
        weight.main_grad = torch.full(weight.shape, 0.25)
        if under_ddp:
            weight.grad_added_to_main_grad = False
    expected = {i: torch.full((OUTPUTS, INPUTS), 0.25, dtype=torch.float64) for i in weights}
    for step in range(2):
        rows = normal(sum(COUNTS), INPUTS, seed=30 + step, dtype=torch.bfloat16)
        upstream = normal(sum(COUNTS), OUTPUTS, seed=40 + step, dtype=torch.bfloat16)
        out, _ = layer(rows, COUNTS)
        out.backward(upstream)
        for i in weights:
            part = upstream.split(COUNTS)[i], rows.split(COUNTS)[i]
            expected[i] += part[0].double().t() @ part[1].double()
    for i, weight in weights.items():
        torch.testing.assert_close(weight.main_grad.double(), expected[i], rtol=1e-6, atol=1e-6)
        assert getattr(weight, "grad_added_to_main_grad", False) == under_ddp
        assert (weight.grad is None) != under_ddp, "DDP's hook fires on a placeholder"


def _kept(layer, rows):
    """The storages of what is kept beyond weights, from the layer's own gradients."""
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        layer(rows, COUNTS)
    return [t for t in kept if t.shape[-1] == INPUTS and t.shape[0] not in (OUTPUTS, len(rows))]


def test_copies_are_kept_of_the_rows_of_what_trains_alone():
    mlp = experts(0, 2, recomputed=True)
    rows = normal(sum(COUNTS), INPUTS, seed=30)
    mine = rows.untyped_storage().data_ptr()
    for layer, shares in ((mlp.linear_fc1, False), (mlp.linear_fc2, True)):
        kept = _kept(layer, rows)
        assert [len(part) for part in kept] == [3, 2]
        assert [part.untyped_storage().data_ptr() == mine for part in kept] == [shares] * 2
        assert shares or all(part.untyped_storage().nbytes() == part.nbytes for part in kept)
    assert not any(
        part.untyped_storage().data_ptr() == mine for part in _kept(experts(0, 2).linear_fc2, rows)
    )


def test_what_is_made_again_before_the_backward_pass_is_read_then():
    """Megatron empties the storage of the activation's output and fills it again."""
    layer = experts(2, recomputed=True).linear_fc2
    rows = normal(sum(COUNTS), INPUTS, seed=30)
    upstream = normal(sum(COUNTS), OUTPUTS, seed=31)
    out, _ = layer(rows, COUNTS)
    again, size = rows.clone(), rows.untyped_storage().nbytes()
    rows.untyped_storage().resize_(0)

    def fill(grad):
        rows.untyped_storage().resize_(size)
        rows.untyped_storage().copy_(again.untyped_storage())

    out.register_hook(fill)
    out.backward(upstream)
    expected = upstream.split(COUNTS)[2].t() @ again.split(COUNTS)[2]
    torch.testing.assert_close(layer.weight2.grad, expected)


class InFp8(Linear):
    """Weights that do not train are FP8 tensors; TE would see only whether the first is one."""

    def __init__(self, trains):
        super().__init__(trains, dtype=torch.bfloat16)
        self.is_first_microbatch, self.multiplied = True, []
        for i in set(range(self.num_gemms)) - set(trains):
            encoded = BlockwiseTensor._quantizer(self._parameters[f"weight{i}"])
            setattr(self, f"weight{i}", torch.nn.Parameter(encoded, False))

    def forward(self, x, m_splits):
        self.is_first_microbatch = False
        self.multiplied.append([getattr(self, f"weight{i}") for i in range(self.num_gemms)])
        return super().forward(x, m_splits)


def test_what_trains_beside_weights_in_fp8_is_encoded_once_a_step():
    mlp = torch.nn.Module()
    mlp.linear_fc1, mlp.linear_fc2 = InFp8((1, 2)), InFp8((1, 2))
    train_some(mlp)
    layer = mlp.linear_fc1
    rows = normal(sum(COUNTS), INPUTS, seed=30, dtype=torch.bfloat16)
    upstream = normal(sum(COUNTS), OUTPUTS, seed=31, dtype=torch.bfloat16)
    layer(rows, COUNTS)[0].backward(upstream)
    with torch.no_grad():
        layer(rows, COUNTS)
        layer.weight2.mul_(1.3)
        layer(rows, COUNTS)
        layer.is_first_microbatch = True
        layer(rows, COUNTS)
    assert all(fp8_weights.is_fp8(weight) for seen in layer.multiplied for weight in seen)
    first, second, third, fourth = (seen[2] for seen in layer.multiplied)
    assert second is first
    assert third is first, "the micro-batches of a step see the weights of its first"
    assert fourth is not first
    assert torch.equal(
        fourth.decoded(), BlockwiseTensor._quantizer(layer._parameters["weight2"]).decoded()
    )
    assert [fp8_weights.is_fp8(weight) for weight in layer.parameters()] == [
        *(True, False, False, True, True)
    ]
    for i in range(5):
        weight = layer._parameters[f"weight{i}"]
        if i in (1, 2):
            expected = upstream.split(COUNTS)[i].t() @ rows.split(COUNTS)[i]
            torch.testing.assert_close(weight.grad, expected)
        else:
            assert weight.grad is None
