"""A checkpoint that a flag of a command names."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from megatron_moe_inject.host.errors import RecipeError
from megatron_moe_inject.host.torch_dist import TorchDistCheckpoint


@dataclass(frozen=True)
class CheckpointPlace:
    """A checkpoint named on the command line; see ``host.torch_dist.CheckpointSource``."""

    flag: str
    path: Path

    def error(self, problem: str, remedy: str) -> RecipeError:
        """The error "--flag path problem; remedy"."""
        return RecipeError(f"{self.flag} {self.path} {problem}; {remedy}", self.flag)

    def open(self) -> TorchDistCheckpoint:
        """The checkpoint.

        Raises:
            RecipeError: it is not there, or no whole ``torch_dist`` checkpoint.
        """
        if not self.path.is_dir():
            raise self.error("is no directory", "name a directory given to Megatron's --save")
        return TorchDistCheckpoint.open(self)
