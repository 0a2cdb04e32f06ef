"""Torch data sets of patches."""
