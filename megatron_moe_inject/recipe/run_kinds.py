"""Kinds of runs: one that trains, two that only evaluate, and one that only writes text."""

INJECTION, EVALUATION, PROFILE = "injection", "evaluation", "profile"
GENERATION = "generation"
