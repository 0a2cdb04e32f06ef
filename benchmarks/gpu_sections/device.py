"""Time and memory of a device; the same code for CUDA and the CPU."""

from __future__ import annotations

import gc
import shutil
import statistics
import subprocess
import threading
import time
from typing import Any

import torch


def wait(device: str) -> None:
    """Wait until the device has finished all work."""
    if device != "cpu":
        torch.cuda.synchronize()


def reset_peak(device: str) -> None:
    """Free cached memory and restart the peak of `peak_gb`."""
    if device != "cpu":
        gc.collect()  # modules and trainers refer to each other
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gb(device: str) -> float | None:
    """Peak memory of tensors since `reset_peak`, GB; None on the CPU."""
    return None if device == "cpu" else torch.cuda.max_memory_allocated() / 1e9


class Clock:
    """Marks on the device's time line; the time between two marks includes the device's idle time."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.marks: list[tuple[str, Any]] = []

    def mark(self, name: str) -> None:
        """End the part ``name`` here."""
        if self.device == "cpu":
            self.marks.append((name, time.perf_counter()))
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self.marks.append((name, event))

    def seconds(self) -> dict[str, float]:
        """Return the total of each part; waits for the device."""
        wait(self.device)
        found: dict[str, float] = {}
        for (_, begin), (name, end) in zip(self.marks, self.marks[1:], strict=False):
            passed = end - begin if self.device == "cpu" else begin.elapsed_time(end) / 1e3
            found[name] = found.get(name, 0.0) + passed
        return found


class Timed:
    """A network (or any function) whose time on the device is measured."""

    def __init__(self, function: Any, device: str) -> None:
        self._function, self._clock = function, Clock(device)

    def __call__(self, *inputs: Any) -> Any:
        self._clock.mark("others")
        result = self._function(*inputs)
        self._clock.mark("inside")
        return result

    def seconds(self) -> float:
        """Return the seconds spent inside so far, and reset them."""
        found = self._clock.seconds().get("inside", 0.0)
        self._clock.marks.clear()
        return found


class Busy:
    """Share of the time in which the GPU was busy, sampled by nvidia-smi; None if that is not available."""

    def __init__(self, device: str) -> None:
        self._command = None
        if device != "cpu" and shutil.which("nvidia-smi") is not None:
            uuid = str(torch.cuda.get_device_properties(0).uuid)
            query = ["--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
            self._command = ["nvidia-smi", "-i", uuid if uuid.startswith("GPU-") else f"GPU-{uuid}", *query]
        self._samples: list[float] = []

    def __enter__(self) -> Busy:
        self._process = None
        if self._command is not None:
            self._process = subprocess.Popen(
                self._command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            self._thread = threading.Thread(target=self._read, daemon=True)
            self._thread.start()
        return self

    def _read(self) -> None:
        assert self._process is not None
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.strip().isdigit():
                self._samples.append(float(line) / 100)

    def __exit__(self, *error: object) -> None:
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
            self._thread.join()

    @property
    def share(self) -> float | None:
        """The mean over the samples."""
        return statistics.fmean(self._samples) if self._samples else None
