"""Keeps this import path; see `connectomics.pipeline.predict`."""

from connectomics.pipeline.predict import predict_cellmap_crops as predict_cellmap_crops
