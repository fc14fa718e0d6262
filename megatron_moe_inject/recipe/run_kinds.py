"""Kinds of runs: one that trains, and two that only evaluate."""

INJECTION, EVALUATION, PROFILE = "injection", "evaluation", "profile"
