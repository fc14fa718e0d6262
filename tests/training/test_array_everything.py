"""The covering array where the whole student trains."""

from tests.harness.array_tests import ArrayTests


class TestEverything(ArrayTests):
    sets = ("everything", "everything, window", "hybrid, everything")
