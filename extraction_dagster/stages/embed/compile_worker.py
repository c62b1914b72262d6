"""Compiles a model's network, in a process of its own: `python -m extraction_dagster.stages.embed.compile_worker`.

A process of its own, because the compiler takes memory which the embedding process would keep, and because whatever the
compiled code does when it is first run, a crash included, then happens here. Its argument names a JSON file, the job.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from extraction_dagster.settings import Settings
from extraction_dagster.stages.embed.compiled import check, probes
from extraction_dagster.stages.embed.model import load_model
from extraction_dagster.stages.embed.native_network import NativeNetwork

if TYPE_CHECKING:
    import torch

    from extraction_dagster.stages.embed.passes import ResidentModel

# Weights are laid out for the CPU when compiling; the number of threads is asked for at each pass; g++ runs here alone.
OPTIONS: Final[dict[str, Any]] = {"freezing": True, "cpp.dynamic_threads": True, "compile_threads": 1}
_MOST_FRAMES = 4096
_PR_SET_PDEATHSIG = 1


def compile_network(model: ResidentModel, num_frames: int) -> Path:
    """Compile a model on the CPU for batches of any size.

    Args:
        model: The model, not compiled.
        num_frames: The batch size that the code is tuned for.

    Returns:
        The shared library, in TORCHINDUCTOR_CACHE_DIR.
    """
    import torch
    import torch._inductor

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = model.network

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return model.forward(pixels).float()

    shape = model.prepare(probes()).shape[1:]
    pixels = torch.zeros((num_frames, *shape), dtype=torch.uint8)
    any_number = ({0: torch.export.Dim("frames", min=1, max=_MOST_FRAMES)},)
    with torch.no_grad():
        exported = torch.export.export(Network().eval(), (pixels,), dynamic_shapes=any_number)
        library = torch._inductor.aot_compile(exported.module(), (pixels,), options=OPTIONS)  # noqa: SLF001 - torch's public name for it
    return Path(str(library))


def main() -> None:
    """Compile, try the result, and move it to where the job says."""
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    _die_with(job["parent"])
    model: Any = load_model(Settings(_env_file=None, device="cpu", compile="off", **job["settings"]))
    library = compile_network(model, job["num_frames"])
    check(NativeNetwork(library), model)
    library.replace(job["output"])


def _die_with(parent: int) -> None:
    """Whoever started this process alone wants its result: end when it is killed."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("whoever started this is gone")


if __name__ == "__main__":
    main()
