"""Original values of what trains, for whatever compares with them."""

from __future__ import annotations

from typing import Protocol

import torch


class OriginalValues(Protocol):
    """Gives what parameters were when the injection began."""

    def of(self, parameter: torch.Tensor, part: slice | None = None) -> torch.Tensor:
        """The original value of a parameter, a constant on its device; of a frozen one, its own.

        Args:
            part: of the flattened parameter, which is then what is returned.
        """
        ...
