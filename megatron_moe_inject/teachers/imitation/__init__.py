"""Imitation of teacher layers: the student's hidden states and its experts' outputs.

``terms`` says what imitates what, ``projections`` leads from the student's width to the teachers',
``exchange`` brings teacher states to the pipeline stages, ``hook`` attaches the losses, and
``setup`` puts them together for a run.
"""
