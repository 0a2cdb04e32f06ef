"""Blockwise work: what a task is, which of its blocks are done, and the engines that run them."""

from connectomics.tasks.block_task import TASK_FILE, BlockTask, BlockWorker, Cost, Worker
from connectomics.tasks.blocks import DoneMap, Lattice
from connectomics.tasks.engines import open_engine
from connectomics.tasks.pool import Engine
from connectomics.tasks.runner import run_task

__all__ = [
    "TASK_FILE",
    "BlockTask",
    "BlockWorker",
    "Cost",
    "DoneMap",
    "Engine",
    "Lattice",
    "Worker",
    "open_engine",
    "run_task",
]
