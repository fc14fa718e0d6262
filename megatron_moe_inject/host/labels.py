"""The labels of samples that belong to no domain."""

from __future__ import annotations

GENERAL = -1
"""Text that is of no domain."""
PREFERENCE = -2
"""An answer of a pair, of which one is preferred to the other (``objective.preference``). It is of
no class of text: what sums over classes leaves it out."""
