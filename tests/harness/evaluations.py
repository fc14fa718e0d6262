"""Evaluations of invented text, for tests."""

from dataclasses import replace

import numpy as np
import torch

from megatron_moe_inject.evaluation.evaluation import BINS, Evaluation, Provenance, build_class
from megatron_moe_inject.losses.preference import PreferenceSpec
from megatron_moe_inject.preference.measured_pairs import MeasuredPairs


def provenance(**changed) -> Provenance:
    fields = {
        "checkpoint": "/ckpt/student",
        "iteration": 0,
        "megatron_version": "0.19.2",
        "tokenizer": "NullTokenizer 61",
        "sequence_length": 32,
        "evaluated_batches": 3,
        "batch_size": 8,
        "teachers": {"coder": "megatron:/ckpt/coder"},
    }
    return Provenance(**fields | changed)


def rows(n=20, seed=0, loss=3.0, teacher=None, length=None, original=None):
    """Hash and sums of n sequences of 32 tokens; losses are per token, with noise."""
    generator = np.random.default_rng(seed)
    hard = generator.normal(0, 10, n)
    found = []
    for i in range(n):
        sums = {"tokens": 32.0, "loss": 32 * loss + hard[i], "correct": float(i % 32)}
        if teacher is not None:
            sums |= {"teacher_loss": 32 * teacher + hard[i], "teacher_kl": 3.0, "agreement": 16.0}
        if original is not None:
            sums["original_kl"] = original * 32
        if length is not None:
            sums["bytes"] = length
        found.append((f"{i:032x}", sums))
    return found


def bins(n=20):
    """All tokens with confidence 0.5, a quarter of them right."""
    found = np.zeros((3, BINS))
    found[:, BINS // 2] = (32 * n, 0.5 * 32 * n, 0.25 * 32 * n)
    return found


def evaluation(code=None, general=None, **changed) -> Evaluation:
    """Two classes, made by ``rows`` with these options."""
    made = {}
    for name, teacher, options in (("code", "coder", code), ("general", None, general)):
        if options is not None:
            own = rows(**options)
            made[name] = build_class(own, bins(len(own)), teacher, [f"/data/{name}"])
    return Evaluation(provenance(**changed), made)


def with_pairs(measured: Evaluation, gain=0.0, against="original", seed=0) -> Evaluation:
    """With three pairs, whose chosen answers are ``gain`` nats likelier than by the reference."""
    generator = np.random.default_rng(seed)
    reference = torch.from_numpy(-20 * generator.random((3, 2)) - 5)
    pairs = MeasuredPairs(
        tuple(f"{7 * i % 3:032x}" for i in range(3)),
        reference + torch.tensor([gain, 0.0]),
        torch.tensor([[4.0, 5.0]] * 3, dtype=torch.float64),
        PreferenceSpec(0.5),
        against,
        None if against is None else reference,
        ("/data/pairs",),
    )
    return replace(measured, pairs=pairs.in_order())
