"""How much memory of the GPUs is in use, where NVIDIA's management library and its Python binding are there."""

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any


def memory_used() -> dict[str, int]:
    """Bytes in use by number of the GPU, all processes together; empty without GPUs."""
    nvml = _nvml()
    if nvml is None:
        return {}
    handles = (nvml.nvmlDeviceGetHandleByIndex(n) for n in range(nvml.nvmlDeviceGetCount()))
    return {str(n): int(nvml.nvmlDeviceGetMemoryInfo(handle).used) for n, handle in enumerate(handles)}


@cache
def _nvml() -> Any:
    if find_spec("pynvml") is None:
        return None
    pynvml = import_module("pynvml")
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return None  # no driver
    return pynvml
