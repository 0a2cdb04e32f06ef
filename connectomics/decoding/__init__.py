"""Predictions to labels: thresholds, connected components, watershed, affinities, hole filling, size filter."""

from connectomics.decoding.cellmap_postprocess import fill_holes, filter_by_size, semantic_to_instance
from connectomics.decoding.decode import decode_class
from connectomics.decoding.parameters import DecodeParameters, decode_parameters, default_parameters, register_decoder

__all__ = [
    "DecodeParameters",
    "decode_class",
    "decode_parameters",
    "default_parameters",
    "fill_holes",
    "filter_by_size",
    "register_decoder",
    "semantic_to_instance",
]
