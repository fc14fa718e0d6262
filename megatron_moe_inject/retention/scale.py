"""What a loss that is attached inside a layer must be multiplied by."""

from __future__ import annotations
