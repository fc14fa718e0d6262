"""The words that choose among losses, for the losses and for recipes; nothing here needs torch."""

KINDS = ("forward_kl", "reverse_kl", "jsd", "skew_kl")
"""Divergences; a new one is a word here and its maths in ``rows`` and ``reference``."""
CONFIDENCES = ("none", "label", "entropy")
"""What weighs a token's distillation."""
COMMITTEES = ("fixed", "label", "top")
"""What weighs teachers against each other."""
TAILS = ("renormalize", "bucket", "sample")
"""What stands for the ids of a teacher that are not known."""
FEATURE_LOSSES = ("mse", "cosine", "normalized")
"""Losses between states."""
