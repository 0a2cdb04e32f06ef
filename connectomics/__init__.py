"""Segment cells in volume electron microscopy: from OME-Zarr volumes to instances, scores and a submission.

    import connectomics as cx

    cell = cx.open_root("data/phantom")
    config = cx.load_config("tutorials/phantom.yaml", "training.max_epochs=2")
    run = cx.train(config, "runs/first")
    probabilities = cx.predict(run, crops="test", out="out/probabilities")
    labels = cx.decode(probabilities, out="out/labels")
    scores = cx.evaluate(labels, cell)

Importing this module imports nothing heavy; each name loads what it needs when it is first used. Functions take their
inputs first and ``out=`` for what they write, return a `Run`, `Probabilities`, `Labels` or `Scores` that the next
function takes, and share ``progress=`` (`connectomics.progress.Progress`), ``resume=`` and ``overwrite=``.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from connectomics.machine import ensure_numba_cache

if TYPE_CHECKING:
    from connectomics.cellmap.catalog import open_root
    from connectomics.config import load_config
    from connectomics.geometry import Box, VoxelGrid
    from connectomics.pipeline.annotate import annotate
    from connectomics.pipeline.apply_edits import apply_edits
    from connectomics.pipeline.decode import decode
    from connectomics.pipeline.evaluate import evaluate
    from connectomics.pipeline.export import export
    from connectomics.pipeline.fetch import fetch
    from connectomics.pipeline.ingest import ingest
    from connectomics.pipeline.merge import merge
    from connectomics.pipeline.package import load_model
    from connectomics.pipeline.plan import plan
    from connectomics.pipeline.predict import predict
    from connectomics.pipeline.pretrain import pretrain
    from connectomics.pipeline.propose import propose
    from connectomics.pipeline.report import report
    from connectomics.pipeline.results import Labels, Probabilities, Scores
    from connectomics.pipeline.runs import Run
    from connectomics.pipeline.score import score
    from connectomics.pipeline.show import show
    from connectomics.pipeline.status import status
    from connectomics.pipeline.study import study
    from connectomics.pipeline.train import train
    from connectomics.pipeline.validate import validate

    __version__: str

#: Where a name is defined, if not in ``pipeline.{name}``.
_MODULES = {
    "Box": "geometry", "VoxelGrid": "geometry", "load_config": "config", "Labels": "pipeline.results",
    "Probabilities": "pipeline.results", "Scores": "pipeline.results", "Run": "pipeline.runs",
    "load_model": "pipeline.package", "open_root": "cellmap.catalog",
}  # fmt: skip

__all__ = [
    "Box",
    "Labels",
    "Probabilities",
    "Run",
    "Scores",
    "VoxelGrid",
    "__version__",
    "annotate",
    "apply_edits",
    "decode",
    "evaluate",
    "export",
    "fetch",
    "ingest",
    "load_config",
    "load_model",
    "merge",
    "open_root",
    "plan",
    "predict",
    "pretrain",
    "propose",
    "report",
    "score",
    "show",
    "status",
    "study",
    "train",
    "validate",
]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("connectomics-cellmap")
        except PackageNotFoundError:  # imported from a folder that is not installed
            return "0+unknown"
    if name not in __all__:
        raise AttributeError(f"module 'connectomics' has no attribute {name!r}")
    value = getattr(import_module(f"connectomics.{_MODULES.get(name, f'pipeline.{name}')}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


ensure_numba_cache()  # before anything imports numba, which reads the variable once
