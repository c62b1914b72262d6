"""The process that embeds: its device, its threads, its allocator.

Everything here acts on the whole process, so it is called when a model is loaded and never at import. Where there are
several GPUs, each process leases the one that it embeds on until it ends:

    <home>/gpus/<uuid of the GPU>.lock    held by the process that has it

The operating system releases a lock when its process ends, however it ends.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import math
import os
import platform
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

from extraction_dagster.errors.embed import EmbeddingDeviceError
from extraction_dagster.permissions import make_private_folder

if TYPE_CHECKING:
    from collections.abc import Sequence
    from contextlib import AbstractContextManager

    from filelock import BaseFileLock

    from extraction_dagster.settings import Settings

_log = logging.getLogger(__name__)
_CGROUP_LIMIT = Path("/sys/fs/cgroup/cpu.max")
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_leases: dict[str, BaseFileLock] = {}


def import_torch() -> None:
    """Import torch for the first time in this process, its idle threads asleep, and without collecting garbage.

    By default a thread of libgomp that waits for the others spins. When other processes want the cores as well, that
    time is lost to everyone: at a load of 10 on 2 cores a frame cost 37 to 54 CPU ms, and 14 to 15 with sleeping
    threads, as on a quiet machine. libgomp reads the variable once, when torch loads it, so it is set for that moment
    alone; a value that was set before, or GOMP_SPINCOUNT, stays.

    Importing makes a million objects that stay. Looking through them for garbage again and again is a tenth of what a
    process spends until its first vector, so that it is not done meanwhile, and never again for those.
    """
    collects = gc.isenabled()
    chosen = "torch" in sys.modules or "OMP_WAIT_POLICY" in os.environ or "GOMP_SPINCOUNT" in os.environ
    if not chosen:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    gc.disable()
    try:
        import torch  # noqa: F401 - for its effect

        gc.freeze()
    finally:
        if collects:
            gc.enable()
        if not chosen:
            del os.environ["OMP_WAIT_POLICY"]


def open_device(settings: Settings) -> str:
    """The device of the settings, this process set up to embed on it.

    Raises:
        EmbeddingDeviceError: The device is not there.
    """
    device = resolve_device(settings.device, settings.home / "gpus")
    tune_process(device, settings.embed_threads)
    return device


def resolve_device(device: str, leases: Path) -> str:
    """The device that a setting means on this machine: `"cpu"`, `"cuda:N"` or `"mps"`.

    Args:
        device: auto (a CUDA device that no other process has leased, else the CPU), cuda (the first), cuda:N, mps, cpu.
        leases: Folder in which processes lease CUDA devices.

    Raises:
        EmbeddingDeviceError: The device is not there.
    """
    present = _present_devices()
    if device == "auto":
        gpus = [name for name in present if name.startswith("cuda")]
        return lease_gpu(gpus, leases) if gpus else "cpu"
    wanted = "cuda:0" if device == "cuda" else device
    if wanted not in present:
        raise EmbeddingDeviceError(device, ", ".join(present))
    return wanted


def _present_devices() -> tuple[str, ...]:
    import torch

    cuda = tuple(f"cuda:{n}" for n in range(torch.cuda.device_count())) if torch.cuda.is_available() else ()
    return ("cpu", *cuda, *(("mps",) if torch.backends.mps.is_available() else ()))


def lease_gpu(devices: Sequence[str], folder: Path) -> str:
    """Lease the first CUDA device that no other process has; the same one at every call.

    When all are leased, one is shared: slower than a device of its own, faster than the CPU.

    Args:
        devices: `"cuda:0"`, `"cuda:1"`, ...
        folder: Where the locks are; made if it does not exist.
    """
    if len(devices) == 1:
        return devices[0]
    paths = {device: str(folder / f"{_uuid(device)}.lock") for device in devices}
    for device, path in paths.items():
        if path in _leases:
            return device
    make_private_folder(folder)
    for device, path in paths.items():
        lock = FileLock(path)
        with suppress(Timeout):
            lock.acquire(timeout=0)
            _leases[path] = lock
            return device
    shared = devices[os.getpid() % len(devices)]
    _log.warning("All %d GPUs are in use by other processes; sharing %s with one of them", len(devices), shared)
    return shared


def _uuid(device: str) -> str:
    import torch

    return str(torch.cuda.get_device_properties(device).uuid)


def tune_process(device: str, threads: int | None) -> None:
    """Set this process's threads, allocator and float precision for embedding on the device.

    A pass over 8 frames allocates and frees some 250 MB of activations. glibc returns such blocks to the kernel at
    once and faults them in again at the next pass: about half of the CPU time. So on the CPU, under glibc, freed
    memory is kept for the next pass instead: the process's memory stays at its peak until it ends.

    On CUDA, convolutions and products run in IEEE float32, not TF32, so that vectors are the same on every device; the
    CPU only makes pixels, in threads of their own, each of which works alone.
    """
    import torch

    if device != "cpu":
        torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined] # made at run time
        torch.backends.cuda.matmul.fp32_precision = "ieee"
        if device.startswith("cuda"):
            torch.set_num_threads(1)
        return
    if threads or "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(threads or usable_cores())
    if not sys.platform.startswith("linux") or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL("libc.so.6")
    options = ((_M_MMAP_MAX, 0), (_M_TRIM_THRESHOLD, 2**31 - 1), (_M_TOP_PAD, 64 << 20))
    if not all(libc.mallopt(option, value) for option, value in options):
        _log.warning("glibc refused the allocator settings; embedding on the CPU costs up to twice the time")


def autocast(device: str, dtype: str) -> AbstractContextManager[object]:
    """Compute in float32 (as the network is), bfloat16 or float16."""
    import torch

    return nullcontext() if dtype == "float32" else torch.autocast(device.partition(":")[0], getattr(torch, dtype))


def resize_device(settings: Settings, device: str) -> str | None:
    """Where frames are resized: on the model's device, or None for the CPU's way."""
    return device if settings.resize_on == "device" else None


def batch_size(settings: Settings, device: str) -> int:
    """Frames per forward pass on a device, default applied.

    On the CPU larger batches than 8 gain nothing and take memory; a GPU is not filled by 8.
    """
    return settings.embed_batch_size or (128 if device.startswith("cuda") else 8)


def num_readers(settings: Settings, device: str) -> int:
    """Threads that make pixels for a device, default applied: a GPU waits for more of them than one."""
    return settings.embed_readers or (min(8, usable_cores()) if device.startswith("cuda") else 1)


def usable_cores(limit_file: Path = _CGROUP_LIMIT) -> int:
    """The cores that this process may use: its affinity, and its container's CPU limit rounded up."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = limit_file.read_text().split()
        # "150000 100000" is one and a half cores: two threads; "max 100000" is no limit.
        return max(1, min(affinity, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):
        return affinity
