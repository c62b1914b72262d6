"""Compiles a model's network, in a process of its own: `python -m extraction_dagster.stages.embed.compiled.worker`.

A process of its own, because exporting takes memory which the embedding process would keep, and because whatever the
network does when it is first run, a crash included, then happens here. Its argument names a JSON file, the job.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from extraction_dagster.settings import Settings
from extraction_dagster.stages.embed.compiled.network import PIXELS, open_passes, probes
from extraction_dagster.stages.embed.models.registry import load_model

if TYPE_CHECKING:
    import torch

    from extraction_dagster.stages.embed.models.interface import EmbeddingModel

_PR_SET_PDEATHSIG = 1


def export_onnx(model: EmbeddingModel, output: Path) -> None:
    """Write a model, on the CPU, in the ONNX format: uint8 (N, h, w, 3) to float32 (N, dim) for any N."""
    import torch

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = model.network  # whose weights torch finds here, if it is a module

        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            return model.forward(pixels).float()

    pixels = torch.zeros((2, *model.prepare(probes()).shape[1:]), dtype=torch.uint8)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns of itself: the newer exporter needs onnxscript, and has no gain here
        torch.onnx.export(
            Network().eval(),
            (pixels,),
            output,
            dynamo=False,
            opset_version=18,
            input_names=[PIXELS],
            dynamic_axes={PIXELS: {0: "frames"}},
        )


def main() -> None:
    """Compile to where the job says, and try the result."""
    job = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    # End when the process that started this one is killed: no other wants the result.
    if sys.platform.startswith("linux"):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != job["parent"]:
        sys.exit("the process that started this one is gone")
    model = load_model(Settings(_env_file=None, device="cpu", **job["settings"]))
    export_onnx(model, Path(job["output"]))
    open_passes(Path(job["output"]), model)


if __name__ == "__main__":
    main()
