"""Properties may take as long as a busy machine needs; Megatron's parser of flags."""

from argparse import ArgumentParser

import pytest
from hypothesis import settings

settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


@pytest.fixture(scope="module")
def parse():
    """Megatron's own parser; flags are checked by nothing else."""
    from megatron.training.arguments import add_megatron_arguments

    parser = ArgumentParser(allow_abbrev=False)
    add_megatron_arguments(parser)
    return lambda line: parser.parse_args(line.split())
