"""Retentions that need no pass of the original model.

``experts`` compares what an expert puts out with what its original would; ``start`` pulls
parameters back to where they began; ``scale`` is what makes an attached loss a mean over a step.
"""
