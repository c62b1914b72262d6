"""Several GPUs, one process each: a process leases the device that it embeds on, until it ends.

    <folder>/<uuid of the GPU>.lock    held by the process that has it

The operating system lets go of a lock when its process ends, however it ends.
"""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from typing import TYPE_CHECKING

from filelock import FileLock, Timeout

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from filelock import BaseFileLock

_log = logging.getLogger(__name__)
LEASES = "gpus"
_held: dict[str, BaseFileLock] = {}


def lease_gpu(devices: Sequence[str], folder: Path) -> str:
    """Lease the first CUDA device that no other process has; the same one at every call.

    When all are leased, one is shared: slower than a device of its own, faster than the CPU.

    Args:
        devices: `"cuda:0"`, `"cuda:1"`, ...
        folder: Where the locks lie; made if it is not there.
    """
    if len(devices) == 1:
        return devices[0]
    paths = {device: str(folder / f"{_uuid(device)}.lock") for device in devices}
    for device, path in paths.items():
        if path in _held:
            return device
    folder.mkdir(parents=True, exist_ok=True)
    for device, path in paths.items():
        lock = FileLock(path)
        with suppress(Timeout):
            lock.acquire(timeout=0)
            _held[path] = lock
            return device
    shared = devices[os.getpid() % len(devices)]
    _log.warning("All %d GPUs are in use by other processes; sharing %s with one of them", len(devices), shared)
    return shared


def _uuid(device: str) -> str:
    import torch

    return str(torch.cuda.get_device_properties(device).uuid)
