"""The covering array with routers, layers' dense parts and the output layer that train."""

from tests.harness.array_tests import ArrayTests


class TestRouter(ArrayTests):
    sets = ("router",)
