"""The covering array with rows of routers, windows and frozen experts in FP8."""

from tests.harness.array_tests import ArrayTests


class TestRows(ArrayTests):
    sets = ("rows",)
