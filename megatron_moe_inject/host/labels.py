"""The label of samples that belong to no domain."""

from __future__ import annotations

GENERAL = -1
