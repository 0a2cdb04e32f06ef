"""Blockwise work: what a task is, which of its blocks are done, and the engines that run them."""

from connectomics.tasks.engine import open_engine
from connectomics.tasks.run import run_task
from connectomics.tasks.task import BlockTask, Cost, Worker

__all__ = ["BlockTask", "Cost", "Worker", "open_engine", "run_task"]
