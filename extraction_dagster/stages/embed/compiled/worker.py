"""Compiles a model's network, in a process of its own: `python -m extraction_dagster.stages.embed.compiled.worker`.

A process of its own, because the compiler takes memory which the embedding process would keep, and because whatever the
compiled code does when it is first run, a crash included, then happens here. Its argument names a JSON file, the job.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from extraction_dagster.settings import Settings
from extraction_dagster.stages.embed.compiled.compiling import ONNX
from extraction_dagster.stages.embed.compiled.network import check, open_network, probes
from extraction_dagster.stages.embed.compiled.onnx import PIXELS
from extraction_dagster.stages.embed.models.registry import load_model

if TYPE_CHECKING:
    import torch

    from extraction_dagster.stages.embed.passes import ResidentModel

# Weights are laid out for the CPU when compiling; the number of threads is asked for at each pass; g++ runs here alone.
# No headers compiled ahead, which nothing would use again; the wrapper only calls kernels, so it isn't optimized: both
# together are a third of the compiling, and change neither the vectors nor the speed.
OPTIONS: Final[dict[str, Any]] = {
    "freezing": True,
    "cpp.dynamic_threads": True,
    "compile_threads": 1,
    "aot_inductor.precompile_headers": False,
    "aot_inductor.compile_wrapper_opt_level": "O0",
}
_MOST_FRAMES = 4096
_PR_SET_PDEATHSIG = 1


def compile_network(model: ResidentModel, num_frames: int) -> Path:
    """Compile a model with AOTInductor for batches of any size.

    Args:
        model: The model, not compiled, on the CPU.
        num_frames: The batch size that the code is tuned for.

    Returns:
        The shared library, in TORCHINDUCTOR_CACHE_DIR.
    """
    import torch
    import torch._inductor

    network, pixels = _as_module(model, num_frames)
    any_number = ({0: torch.export.Dim("frames", min=1, max=_MOST_FRAMES)},)
    with torch.no_grad():
        exported = torch.export.export(network, (pixels,), dynamic_shapes=any_number).module()
        return Path(str(torch._inductor.aot_compile(exported, (pixels,), options=OPTIONS)))  # noqa: SLF001 - no other name


def export_onnx(model: ResidentModel, output: Path) -> Path:
    """Write a model in the ONNX format, for batches of any size."""
    import torch

    network, pixels = _as_module(model, 2)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of itself: the newer exporter needs onnxscript, and has no gain here
        torch.onnx.export(
            network,
            (pixels,),
            output,
            dynamo=False,
            opset_version=18,
            input_names=[PIXELS],
            dynamic_axes={PIXELS: {0: "frames"}},
        )
    return output


def _as_module(model: ResidentModel, num_frames: int) -> tuple[torch.nn.Module, torch.Tensor]:
    """What is compiled, and an input as it will be."""
    import torch

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = model.network  # whose weights torch finds here, if it is a module

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return model.forward(pixels).float()

    shape = model.prepare(probes()).shape[1:]
    return Network().eval(), torch.zeros((num_frames, *shape), dtype=torch.uint8)


def main() -> None:
    """Compile, try the result, and move it to where the job says."""
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    _die_with(job["parent"])
    model: Any = load_model(Settings(_env_file=None, device="cpu", compile="off", **job["settings"]))
    output, is_onnx = Path(job["output"]), job["kind"] == ONNX
    made = export_onnx(model, output) if is_onnx else compile_network(model, job["num_frames"])
    check(open_network(job["kind"], made), model)
    made.replace(output)


def _die_with(parent: int) -> None:
    """Whoever started this process alone wants its result: end when it is killed."""
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("whoever started this is gone")


if __name__ == "__main__":
    main()
