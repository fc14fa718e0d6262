"""Asserts in the harness say as much as those in tests; none begins after ``TESTS_UNTIL``."""

import os
import time

import pytest

pytest.register_assert_rewrite("tests.harness")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Once the clock has passed ``TESTS_UNTIL`` (seconds since 1970) what is left is skipped."""
    if time.time() > float(os.environ.get("TESTS_UNTIL", "inf")):
        pytest.skip("the time for the tests is over (TESTS_UNTIL)")
