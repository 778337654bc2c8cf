"""Facts about the machine and its processes: processor, memory, running processes."""

from __future__ import annotations

import platform
import re
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

MIB = 1 << 20

LINUX_STATUS = Path("/proc/self/status")
LINUX_RESET = Path("/proc/self/clear_refs")
LINUX_PROCESSORS = Path("/proc/cpuinfo")


def hardware() -> dict[str, Any]:
    """Describe the machine: processor, cores this process may use, memory, accelerators."""
    import psutil
    import torch

    process = psutil.Process()
    cores = len(process.cpu_affinity() or ()) if hasattr(process, "cpu_affinity") else psutil.cpu_count()
    return {
        "cpu": processor(),
        "cores": cores,
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def processor() -> str:
    """Return the processor's name, from /proc/cpuinfo on Linux, which psutil and platform do not read."""
    if LINUX_PROCESSORS.is_file():
        text = LINUX_PROCESSORS.read_text(encoding="utf-8", errors="replace")
        match = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
        if match:
            return match[1].strip()
    return platform.processor() or platform.machine()


def is_running(process: int) -> bool:
    """Whether a process of this machine is running; no signal is sent, which would end it on Windows."""
    import psutil

    return psutil.pid_exists(process)


def reset_peak_memory() -> None:
    """Reset this process's peak memory; possible on Linux only."""
    with suppress(
        OSError
    ):  # not allowed, or no such file: the peak then counts from the start of the process
        LINUX_RESET.write_text("5", encoding="ascii")


def peak_memory_mb() -> float:
    """Return the largest memory of this process so far, in MB; since :func:`reset_peak_memory` on Linux.

    psutil reports the peak on Windows only; elsewhere it comes from the kernel, or is the current memory.
    """
    import psutil

    if LINUX_STATUS.is_file():  # getrusage ignores the reset
        text = LINUX_STATUS.read_text(encoding="ascii", errors="replace")
        peak = re.search(r"^VmHWM:\s*(\d+) kB", text, re.MULTILINE)
        if peak:
            return int(peak[1]) / 1024
    memory: Any = psutil.Process().memory_info()
    if hasattr(memory, "peak_wset"):  # Windows
        return memory.peak_wset / MIB
    try:
        import resource
    except ImportError:
        return memory.rss / MIB
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest / (MIB if sys.platform == "darwin" else 1024)
