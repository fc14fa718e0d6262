"""The covering array with a hybrid student, against a GPT student on one process."""

from tests.harness.array_tests import ArrayTests


class TestHybrid(ArrayTests):
    sets = ("hybrid", "hybrid, rows")
