"""A predictions folder to labels in one call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from connectomics.decoding.parameters import DecodeParameters
from connectomics.pipeline.decode import DecodedArray, decode_jobs, do_jobs
from connectomics.progress import Progress, silent


def decode_predictions(
    predictions: str | Path,
    labels: str | Path,
    parameters: Mapping[str, DecodeParameters] | None = None,
    *,
    engine: Any = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: Progress = silent,
    **what: Any,
) -> list[DecodedArray]:
    """``what``: further arguments of `decode_jobs`."""
    jobs = decode_jobs(predictions, labels, parameters, **what)
    return do_jobs(jobs, engine, overwrite=overwrite, resume=resume, progress=progress)
