"""The covering array where little trains, and the pairs of what excludes each other."""

from tests.harness.array_tests import ArrayTests


class TestPairs(ArrayTests):
    sets = ("nothing first", "router, fp8", "rows, imitation", "router, window", "rollouts, window")
