"""Watches what the student's routers decide, while Megatron trains or evaluates.

Each router's ``routing`` is wrapped: what it decided is summed over the positions of each sequence
where it runs, without a copy of the tokens and without waiting for the device. At the end of a step
the sums of a sequence are completed over the ranks that hold its parts. Activations that are
recomputed are counted once. Routers of multi-token-prediction layers are not watched.

Shapes: n micro-batches of a step, b samples each, l this rank's part of the sequence, L MoE layers
of this rank, E experts.
"""

from __future__ import annotations
