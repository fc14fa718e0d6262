"""The losses that ``loss_bench.py`` compares.

Shapes: t tokens, h student hidden, h_t teacher hidden, v vocabulary, p tensor-parallel size.

Every contender starts from hidden states and heads and ends with gradients by the student's hidden
states (and head), because the logits are what costs. What takes logits gets them from plain matrix
products whose backward sums the hidden states' gradient over the tensor-parallel group, as
Megatron's column-parallel head does. Beside every contender stands what it claims to compute, on
whole logits: a missing T^2 is a difference that the notes state, not an error.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from compiled_rows import CompiledRows
from torch import Tensor

from megatron_moe_inject import losses
from megatron_moe_inject.losses import reference
from megatron_moe_inject.losses.triton_rows import AUTO


@dataclass(frozen=True)
class Settings:
    """What one process measures; ``topk`` is the ids per token of the top-k contenders."""

    contender: str
    kind: str
    temperature: float
    alpha: float
    beta: float
    dtype: str
    device: str
    threads: int
    tp: int
    rank: int
    store: str
    hidden: int
    teacher_hidden: int
    topk: int
    jsd_beta: float = 0.5
    skew: float = 0.1

    @property
    def group(self):
        return dist.group.WORLD if self.tp > 1 else None

    @property
    def torch_device(self) -> torch.device:
        return torch.device(self.device, self.rank if self.device == "cuda" else None)


class Inputs(NamedTuple):
    """hidden [t, h], weight [v/p, h], teacher_hidden [t, h_t], teacher_weight [v/p, h_t], labels
    [t]; ids and log_probs [t, k] for contenders with a stored teacher, at temperature 1."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor
    teacher_weight: Tensor
    labels: Tensor
    ids: Tensor | None = None
    log_probs: Tensor | None = None


Loss = Callable[[Inputs], tuple[Tensor, Tensor]]  # what backward starts from, and the value


@dataclass(frozen=True)
class Contender:
    """A loss, ``dense`` what it should be: (settings, x, y, inputs) on whole logits -> [t]."""

    title: str
    note: str
    build: Callable[[Settings], Loss]
    dense: Callable[[Settings, Tensor, Tensor, Inputs], Tensor]
    install: str = "megatron-moe-inject"
    kinds: tuple[str, ...] = losses.KINDS
    shards: bool = True
    needs_cuda: bool = False
    stored_teacher: bool = False
    with_ce: bool = False
    trained_only: bool = False


class _SumGradient(torch.autograd.Function):
    """Identity whose backward sums over the tensor-parallel group."""

    @staticmethod
    def forward(ctx, hidden, group):
        ctx.group = group
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient, group=ctx.group)
        return gradient, None


class _GatherColumns(torch.autograd.Function):
    """[t, v/p] -> [t, v]; backward takes this rank's columns, of a loss equal on all ranks."""

    @staticmethod
    def forward(ctx, block, group):
        ctx.columns = slice(group.rank() * block.shape[1], (group.rank() + 1) * block.shape[1])
        parts = [torch.empty_like(block) for _ in range(group.size())]
        dist.all_gather(parts, block.contiguous(), group=group)
        return torch.cat(parts, dim=1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient[:, ctx.columns], None


def student_logits(s: Settings, i: Inputs) -> Tensor:
    hidden = i.hidden if s.group is None else _SumGradient.apply(i.hidden, s.group)
    return hidden @ i.weight.t()


@torch.no_grad()
def teacher_logits(i: Inputs) -> Tensor:
    return i.teacher_hidden @ i.teacher_weight.t()


def with_value(s: Settings, loss: Tensor, partial: bool = False) -> tuple[Tensor, Tensor]:
    """A loss and its value; ``partial``: each rank has the part of its vocabulary ids."""
    value = loss.detach().clone()
    if partial and s.group is not None:
        dist.all_reduce(value, group=s.group)
    return loss, value


def build_naive(s: Settings) -> Loss:
    t = s.temperature

    def loss(i: Inputs):
        x, y = student_logits(s, i), teacher_logits(i)
        if s.group is not None:
            x, y = (_GatherColumns.apply(logits, s.group) for logits in (x, y))
        x, y = x.float(), y.float()
        log_q, log_p = F.log_softmax(x / t, dim=-1), F.log_softmax(y / t, dim=-1)

        def kl(a, b):
            return F.kl_div(b, a, reduction="batchmean", log_target=True)

        if s.kind == "forward_kl":
            kd = kl(log_p, log_q)
        elif s.kind == "reverse_kl":
            kd = kl(log_q, log_p)
        else:
            w = s.jsd_beta if s.kind == "jsd" else s.skew
            log_m = torch.logaddexp(log_p + math.log(w), log_q + math.log(1 - w))
            kd = kl(log_p, log_m)
            if s.kind == "jsd":
                kd = w * kd + (1 - w) * kl(log_q, log_m)
        return with_value(s, s.alpha * t**2 * kd + s.beta * F.cross_entropy(x, i.labels))

    return loss


def build_ours(s: Settings, any_upstream: bool = False, kernels: Callable = lambda: AUTO) -> Loss:
    kernels = kernels()

    def loss(i: Inputs):
        mask = None if any_upstream else torch.ones(len(i.hidden), device=i.hidden.device)
        divergence = losses.Divergence(s.kind, s.jsd_beta, s.skew)
        out = losses.fused_loss(
            losses.Student(i.hidden, i.weight, i.labels, losses.Vocabulary(s.group)),
            losses.Dense(i.teacher_hidden, i.teacher_weight),
            losses.TermWeights(s.alpha, s.beta, divergence, s.temperature),
            losses.FusedOptions(kernels=kernels, upstream_mask=mask),
        )
        return with_value(s, out.total.mean())

    return loss


def build_ours_logits(s: Settings) -> Loss:
    def loss(i: Inputs):
        kd = losses.vocab_parallel_divergence(
            student_logits(s, i), teacher_logits(i), kind=s.kind, temperature=s.temperature,
            tp_group=s.group, beta=s.jsd_beta, skew=s.skew,
        )  # fmt: skip
        return with_value(s, kd.mean())

    return loss


def build_ours_stored(s: Settings) -> Loss:
    def loss(i: Inputs):
        kd = losses.vocab_parallel_sparse_divergence(
            student_logits(s, i), i.ids, i.log_probs, kind=s.kind, tail="bucket", tp_group=s.group
        )
        return with_value(s, kd.mean())

    return loss


def build_modelopt(s: Settings, top: bool = False) -> Loss:
    from modelopt.torch.distill.plugins.megatron import LogitsKLLoss, TopKLogitsKLLoss  # isort: skip
    from megatron.core import parallel_state
    from megatron.core.transformer import TransformerConfig

    if s.tp > 1 and not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=s.tp)
    config = TransformerConfig(
        num_layers=1, hidden_size=64, num_attention_heads=8, tensor_model_parallel_size=s.tp
    )
    options = dict(temperature=s.temperature, reverse=s.kind == "reverse_kl")
    if top:
        module = TopKLogitsKLLoss(config, top_k=s.topk, **options)
    else:
        module = LogitsKLLoss(config, **options)

    def loss(i: Inputs):
        kd, partial, _ = module(student_logits(s, i)[:, None], teacher_logits(i)[:, None])
        return with_value(s, kd.mean(), partial)

    return loss


def build_megatron(s: Settings) -> Loss:
    from megatron.training.distillation.cached_logits_loss import topk_kl_div

    def loss(i: Inputs):
        kd = topk_kl_div(
            student_logits(s, i)[:, None], i.log_probs[:, None], i.ids[:, None],
            s.tp, s.rank, s.group, add_ghost_token=True,
        )  # fmt: skip
        return with_value(s, kd.mean(), partial=True)

    return loss


def liger_beta(s: Settings) -> float:
    """Liger's generalised JSD is forward KL at 0 and reverse KL at 1."""
    return {"forward_kl": 0.0, "reverse_kl": 1.0, "jsd": s.jsd_beta}[s.kind]


def build_liger_chunked(s: Settings, chunk: int = 1024) -> Loss:
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    module = LigerFusedLinearJSDLoss(
        weight_hard_loss=s.beta, weight_soft_loss=s.alpha, beta=liger_beta(s),
        temperature=s.temperature, compiled=True, chunk_size=chunk,
    )  # fmt: skip
    return lambda i: with_value(s, module(*i[:5]))


def build_liger_jsd(s: Settings) -> Loss:
    from liger_kernel.transformers.fused_linear_jsd import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=liger_beta(s), temperature=s.temperature)
    return lambda i: with_value(s, module(*i[:4], None))  # no labels to ignore


def build_liger_kl(s: Settings) -> Loss:
    from liger_kernel.transformers.fused_linear_kl_div import LigerFusedLinearKLDivLoss

    module = LigerFusedLinearKLDivLoss(temperature=s.temperature)

    def loss(i: Inputs):
        target = (teacher_logits(i) / s.temperature).softmax(-1)
        return with_value(s, module(i.hidden, i.weight, target))

    return loss


def dense_kd(s: Settings, x: Tensor, y: Tensor, _: Inputs | None = None) -> Tensor:
    """T^2 D on whole logits."""
    options = {"jsd": {"beta": s.jsd_beta}, "skew_kl": {"alpha": s.skew}}.get(s.kind, {})
    return getattr(reference, s.kind)(x, y, temperature=s.temperature, **options)


def dense_total(s: Settings, x: Tensor, y: Tensor, i: Inputs) -> Tensor:
    return s.alpha * dense_kd(s, x, y) + s.beta * reference.cross_entropy(x, i.labels)


def dense_total_no_square(s: Settings, x: Tensor, y: Tensor, i: Inputs) -> Tensor:
    kd = dense_kd(s, x, y) / s.temperature**2
    return s.alpha * kd + s.beta * reference.cross_entropy(x, i.labels)


def dense_no_square(s: Settings, x: Tensor, y: Tensor, _: Inputs) -> Tensor:
    return dense_kd(s, x, y) / s.temperature**2


def dense_top(s: Settings, x: Tensor, y: Tensor, _: Inputs) -> Tensor:
    top = y.topk(s.topk, dim=-1)
    return dense_kd(s, x.gather(-1, top.indices), top.values) / s.temperature**2


def dense_stored(s: Settings, x: Tensor, _: Tensor, i: Inputs) -> Tensor:
    return reference.sparse_divergence(
        x, i.ids, i.log_probs.to(x.dtype), kind=s.kind, tail="bucket"
    )


_KLS = ("forward_kl", "reverse_kl")
_MODELOPT, _LIGER = "nvidia-modelopt", "liger-kernel"
_CHUNKED = (
    "a T^2 D + b CE, but without the T^2; no TP; computes the head's gradient when frozen, too"
)
CONTENDERS = {
    "naive": Contender(
        "naive torch", "a T^2 D + b CE from whole logits; under TP gathers them on every rank",
        build_naive, dense_total, with_ce=True,
    ),
    "ours": Contender(
        "ours, fused",
        "fused_loss: a T^2 D + b CE, never whole logits; on a GPU Triton kernels",
        build_ours, dense_total, with_ce=True,
    ),
    "ours-any": Contender(
        "ours, any upstream",
        "the same without upstream_mask; differs where the head trains: logits made twice",
        lambda s: build_ours(s, any_upstream=True), dense_total, with_ce=True, trained_only=True,
    ),
    "ours-torch": Contender(
        "ours (torch rows)", "ours, fused with torch operations between the products, on a GPU too",
        lambda s: build_ours(s, kernels=lambda: None), dense_total, with_ce=True,
        needs_cuda=True,
    ),
    "ours-compiled": Contender(
        "ours (torch.compile)", "ours, fused with the operations between the products compiled",
        lambda s: build_ours(s, kernels=CompiledRows), dense_total, with_ce=True,
    ),
    "ours-logits": Contender(
        "ours, on logits", "vocab_parallel_divergence: T^2 D of whole (sharded) logits; no CE",
        build_ours_logits, dense_kd,
    ),
    "modelopt": Contender(
        "Model-Optimizer", "LogitsKLLoss: D of whole (sharded) logits; no T^2, no CE",
        build_modelopt, dense_no_square, _MODELOPT, _KLS,
    ),
    "modelopt-topk": Contender(
        "Model-Optimizer top-k",
        "TopKLogitsKLLoss: D over the teacher's k likeliest ids, both sides scaled to 1; no T^2, "
        "no CE",
        lambda s: build_modelopt(s, top=True), dense_top, _MODELOPT, _KLS,
    ),
    "megatron-topk": Contender(
        "Megatron top-k",
        "topk_kl_div with ghost token: stored teacher, so no teacher product; T = 1 only, no CE",
        build_megatron, dense_stored, "'megatron-core[training]>=0.19'", ("forward_kl",),
        stored_teacher=True,
    ),
    "ours-topk": Contender(
        "ours, top-k", "vocab_parallel_sparse_divergence, tail bucket: as Megatron top-k, at T = 1",
        build_ours_stored, dense_stored, stored_teacher=True,
    ),
    "liger-chunked": Contender(
        "Liger chunked", f"LigerFusedLinearJSDLoss, compiled, chunk_size 1024: {_CHUNKED}",
        build_liger_chunked, dense_total_no_square, _LIGER, (*_KLS, "jsd"), shards=False,
        with_ce=True,
    ),
    "liger-chunked-64": Contender(
        "Liger chunked, 64", f"the same with chunk_size 64: {_CHUNKED}",
        lambda s: build_liger_chunked(s, 64), dense_total_no_square, _LIGER, (*_KLS, "jsd"),
        shards=False, with_ce=True,
    ),
    "liger-jsd": Contender(
        "Liger fused JSD", "LigerFusedLinearJSD (Triton): D; no T^2, no CE, no TP",
        build_liger_jsd, dense_no_square, _LIGER, (*_KLS, "jsd"), shards=False, needs_cuda=True,
    ),
    "liger-kl": Contender(
        "Liger fused KL",
        "LigerFusedLinearKLDivLoss (Triton): D from the teacher's whole probabilities; no T^2, no "
        "CE, no TP",
        build_liger_kl, dense_no_square, _LIGER, ("forward_kl",), shards=False, needs_cuda=True,
    ),
}  # fmt: skip
