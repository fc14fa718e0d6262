"""Inputs and comparisons that the loss tests share.

Shapes: t tokens, h and h_t hidden, v vocabulary. Everything a test needs follows from a seed, so
the ranks of a multi-process test build the same whole tensors and cut their own part out.
"""

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from megatron_moe_inject.losses import (
    Dense,
    Divergence,
    FusedOptions,
    LogitTransform,
    Mixed,
    Student,
    Target,
    TermWeights,
    Vocabulary,
    fused_loss,
    reference,
)

KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_kl")
HEADS = ("frozen", "trained", "promised")  # the last with upstream_mask
V, VALID = 24, 17  # 4 shards of 6: the third holds 5 real ids, the last none

# The references with a mixture of their own, and its weights under the names of the fast paths.
REFERENCES = {
    "forward_kl": reference.forward_kl,
    "reverse_kl": reference.reverse_kl,
    "jsd": partial(reference.jsd, beta=0.3),
    "skew_kl": partial(reference.skew_kl, alpha=0.2),
}
MIXTURE = {"beta": 0.3, "skew": 0.2}


def logits(seed: int, *shape: int, dtype=torch.float64, scale=2.0) -> tuple[Tensor, Tensor]:
    """Student and teacher logits."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, *shape, generator=generator, dtype=torch.float64) * scale
    return x.to(dtype), y.to(dtype)


@dataclass
class FusedCase:
    """Whole inputs of one fused call and the upstream gradient [t]."""

    hidden: Tensor
    weight: Tensor
    teacher_hidden: Tensor | None
    teacher_weight: Tensor | None
    labels: Tensor
    upstream: Tensor
    options: dict

    @classmethod
    def make(cls, seed=0, t=11, h=6, h_t=4, v=V, valid=VALID, dtype=torch.float64, **options):
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

        labels = torch.randint(0, valid or v, (t,), generator=generator)
        labels[1::4] = -100
        options = {"kind": "forward_kl", "temperature": 2.0, "alpha": 0.7, "beta": 0.3} | options
        options["valid_vocab_size"] = valid
        upstream = normal(t).to(torch.promote_types(dtype, torch.float32))
        return cls(
            normal(t, h), normal(v, h), normal(t, h_t), normal(v, h_t), labels, upstream, options
        )

    def shard(self, rank: int, size: int) -> "FusedCase":
        """The heads cut to this rank's rows, with NaN where the vocabulary is padding, and excluded
        ids as this rank's columns."""
        width = len(self.weight) // size
        ids = torch.arange(rank * width, (rank + 1) * width)

        def cut_transform(transform):
            if transform is None or transform.excluded is None:
                return transform
            here = transform.excluded[torch.isin(transform.excluded, ids)] - rank * width
            return replace(transform, excluded=here)

        padding = (ids >= (self.options["valid_vocab_size"] or len(self.weight)))[:, None]
        cut = dict(vars(self))
        for name in ("weight", "teacher_weight"):
            if cut[name] is not None:
                cut[name] = cut[name][ids].masked_fill(padding, torch.nan)
        if self.options.get("teacher_transform") is not None:
            own = cut_transform(self.options["teacher_transform"])
            cut["options"] = self.options | {"teacher_transform": own}
        target = self.options.get("target")
        if isinstance(target, Mixed):
            members = tuple(
                replace(
                    member,
                    head=member.head[ids].masked_fill(padding, torch.nan),
                    transform=cut_transform(member.transform),
                )
                if isinstance(member, Dense)
                else member
                for member in target.members
            )
            cut["options"] = self.options | {"target": replace(target, members=members)}
        return FusedCase(**cut)

    def leaves(self, head_trains=True) -> tuple[Tensor, Tensor]:
        """Fresh leaves of the hidden states and of the head."""
        hidden = self.hidden.clone().requires_grad_()
        return hidden, self.weight.clone().requires_grad_(head_trains)

    def promise(self, head: str = "promised") -> dict:
        """What ``head`` of ``HEADS`` adds to a call: a mask of which ``upstream`` is a multiple."""
        return {"upstream_mask": self.upstream / -0.3} if head == "promised" else {}

    def student(
        self, hidden: Tensor, weight: Tensor, tp_group=None, transform=None, **changes
    ) -> Student:
        """The student with these leaves; ``changes`` are ``head_rows`` and ``head_low_rank``."""
        vocabulary = Vocabulary(tp_group, self.options["valid_vocab_size"])
        return Student(hidden, weight, self.labels, vocabulary, transform, **changes)

    def target(self, transform: LogitTransform | None = None) -> Target | None:
        """What the teacher says, by its hidden states and head; None without one."""
        if self.teacher_hidden is None:
            return None
        return Dense(self.teacher_hidden, self.teacher_weight, transform)

    def call(self, hidden: Tensor, weight: Tensor, **options):
        """The fused loss, ``options`` going before those of the case."""
        given = self.options | options
        transform = given.pop("teacher_transform", None)
        target = given.pop("target", None) or self.target(transform)
        tp_group, transform = given.pop("tp_group", None), given.pop("student_transform", None)
        del given["valid_vocab_size"]
        weights = TermWeights(
            given.pop("alpha"),
            given.pop("beta"),
            Divergence(given.pop("kind"), **MIXTURE),
            given.pop("temperature"),
            given.pop("weighting", None),
        )
        changes = {name: given.pop(name, None) for name in ("head_rows", "head_low_rank")}
        student = self.student(hidden, weight, tp_group, transform, **changes)
        return fused_loss(student, target, weights, FusedOptions(**given))

    def dense(self) -> dict[str, Tensor]:
        """Losses and gradients of the reference in float64."""
        hidden = self.hidden.to(torch.float64, copy=True).requires_grad_()
        weight = self.weight.to(torch.float64, copy=True).requires_grad_()
        options = {
            name: value.double() if isinstance(value, Tensor) else value
            for name, value in self.options.items()
        }
        teacher = (self.teacher_hidden, self.teacher_weight)
        total, kd, ce, factor = reference.linear_distillation(
            hidden, weight, *(None if part is None else part.double() for part in teacher),
            self.labels, divergence=REFERENCES[options.pop("kind")],
            committee=options.pop("target", None), **options,
        )  # fmt: skip
        grads = torch.autograd.grad(total, (hidden, weight), self.upstream.double())
        losses = {"total": total.detach(), "kd": kd.detach(), "ce": ce.detach()}
        return losses | {"kd_factor": factor, "hidden": grads[0], "weight": grads[1]}


def committee_case(widths=(4, 7), by="fixed", dtype=torch.float64, **options) -> FusedCase:
    """A case whose teachers are a committee of these widths, the last with capped logits."""
    case = FusedCase.make(dtype=dtype, **options)
    generator = torch.Generator().manual_seed(9)
    members = []
    for width in widths:
        shapes = (len(case.hidden), width), (len(case.weight), width)
        states, head = (
            torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
            for shape in shapes
        )
        members.append(Dense(states, head))
    members[-1] = replace(members[-1], transform=LogitTransform(0.5, 4.0))
    weights = tuple(0.7 / 2**i for i in range(len(widths)))
    case.options["target"] = Mixed(tuple(members), weights, by)
    case.teacher_hidden = case.teacher_weight = None
    return case


def per_token(t: int, seed: int = 5) -> Tensor:
    """Weights [t] in (0, 1) with some exact zeros."""
    weights = torch.rand(t, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    weights[::5] = 0
    return weights


def assert_close(actual: Tensor, expected: Tensor, what: str, tolerance: float = 1e-10) -> None:
    """Compare in float64, relative to the largest expected number."""
    actual, expected = actual.detach().double(), expected.detach().double()
    assert actual.shape == expected.shape, f"{what}: {actual.shape} is not {expected.shape}"
    worst = (actual - expected).abs().max().item() if actual.numel() else 0.0
    limit = tolerance * max(1.0, expected.abs().max().item() if expected.numel() else 0.0)
    assert worst <= limit, f"{what}: off by {worst:.3g}, allowed {limit:.3g}"


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Frobenius norm of the difference over that of the expected."""
    return ((actual.detach().double() - expected).norm() / expected.norm()).item()
