"""Blockwise work: what a task is, which of its blocks are done, and the engines that run them."""

from connectomics.tasks.block_task import BlockTask, Cost, Worker
from connectomics.tasks.engine import open_engine
from connectomics.tasks.runner import run_task

__all__ = ["BlockTask", "Cost", "Worker", "open_engine", "run_task"]
