"""Which thread the kernel lets in first: those that answer and send need little, but soon; those that compute, much."""

import ctypes
import os
import platform
import struct
import sys
import threading

COMPUTING_NICE = 10
SLICE_NS = 100_000
"""The shortest that Linux gives."""
_SYSCALLS = {"x86_64": (314, 315), "aarch64": (274, 275)}
"""sched_setattr and sched_getattr, which Python has no names for."""
_ATTRIBUTES = struct.Struct("<IIQiIQQQ")
"""struct sched_attr: size, policy, flags, nice, priority, runtime, deadline, period.  Of an ordinary thread the runtime
is the slice, and the policy is 0."""


def give_way() -> None:
    """Let this thread compute only where no other one has anything to do."""
    if sys.platform == "linux":  # elsewhere the priority is that of the whole process
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), COMPUTING_NICE)


def ask_for_short_slices() -> bool:
    """Take the processor for 0.1 ms at a time instead of 3, this thread and those it starts; whether the kernel does.

    Linux from 6.12 lets a thread that wakes go before one in the middle of its slice if its own is shorter: without,
    each step of a request that finds all cores computing waits for milliseconds.  Nobody gets less for it in the end.
    """
    if sys.platform != "linux" or platform.machine() not in _SYSCALLS:
        return False
    if os.sched_getscheduler(0) != os.SCHED_OTHER:  # somebody has chosen otherwise
        return False
    nice, _ = of_thread(0)
    attributes = _ATTRIBUTES.pack(_ATTRIBUTES.size, 0, 0, nice, 0, SLICE_NS, 0, 0)
    ctypes.CDLL(None).syscall(_SYSCALLS[platform.machine()][0], 0, attributes, 0)
    # Older kernels take the call and do nothing.
    return of_thread(0)[1] == SLICE_NS


def of_thread(thread: int) -> tuple[int, int]:
    """Nice and slice, ns, of a thread, 0 for this one; where the kernel tells."""
    attributes = ctypes.create_string_buffer(_ATTRIBUTES.size)
    ctypes.CDLL(None).syscall(_SYSCALLS[platform.machine()][1], thread, attributes, _ATTRIBUTES.size, 0)
    _, _, _, nice, _, slice_ns, _, _ = _ATTRIBUTES.unpack(attributes.raw)
    return nice, slice_ns
