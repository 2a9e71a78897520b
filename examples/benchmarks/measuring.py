"""Time and memory, side by side: alternating runs, and peaks in processes of their own."""

import ctypes
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path


def alternate(forms, rounds):
    """Return the median seconds of each form, after one run of each that does not count.

    `forms` maps names to functions without arguments; they take turns, so that whatever else the
    machine does meets all of them.
    """
    seconds = {name: [] for name in forms}
    for _ in range(rounds + 1):
        for name, form in forms.items():
            start = time.perf_counter()
            form()
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in seconds.items()}


def in_fresh_process(script, *options):
    """Run a script by itself and return the number that it prints last."""
    command = [sys.executable, script, *map(str, options)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return float(output.split()[-1])


def extra_memory(work):
    """Return the peak of resident memory during `work` beyond what there was before, in MB.

    Linux only (VmHWM of /proc/self/status); NaN elsewhere.
    """
    peak = Path("/proc/self/clear_refs")
    if peak.exists():
        getattr(ctypes.CDLL(None), "malloc_trim", int)(0)  # freed memory would be taken unseen
        peak.write_text("5")  # peaks before this do not count
    before = resident_memory("VmRSS")
    work()
    return resident_memory("VmHWM") - before


def resident_memory(key):
    """Return a line of /proc/self/status, in MB."""
    status = Path("/proc/self/status")
    if not status.exists():
        return float("nan")
    return int(re.search(rf"{key}:\s+(\d+) kB", status.read_text()).group(1)) / 1024
