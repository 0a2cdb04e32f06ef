"""From the configuration's `engine` group to processes that work."""

from __future__ import annotations

from connectomics.config.schema import EngineConfig
from connectomics.tasks.pool import Engine, Here, gpu_count


def open_engine(config: EngineConfig | None = None, device: str = "cpu") -> Engine:
    """The workers that a configuration asks for; a context manager, to be kept over all tasks of a command.

    Args:
        config: None: this process.
        device: of the workers: ``cpu``, ``cuda`` (each process one of the GPUs, in turn) or ``cuda:N``.

    Raises:
        EngineError: a scheduler that does not answer, a library that is not installed, a queue that takes no job.
    """
    chosen = EngineConfig() if config is None else config
    if chosen.name == "dask":
        from connectomics.tasks.cluster import DaskEngine

        return DaskEngine(chosen, device)
    from connectomics.tasks.processes import Processes

    workers = chosen.workers or (max(1, gpu_count()) if device == "cuda" else 1)
    limited = chosen.block_timeout_s is not None or chosen.memory_gb is not None
    if workers == 1 and not limited:  # limits can only be held against another process
        return Here(chosen, device)
    return Processes(chosen, workers, device)
