"""Scores: the usual ones (`cellmap_metrics`, `evaluate`) and the challenge's own (`challenge`).

Nothing is imported here, so that ``import connectomics.metrics`` costs nothing.
"""
