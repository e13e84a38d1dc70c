"""torch.export: a .pt2 file that PyTorch runs and AOTInductor compiles."""

import io
import warnings
from pathlib import Path

import torch

from electra_fast.export.engine import Engine, of_module
from electra_fast.export.model import INPUTS, Source, to_export
from electra_fast.export.onnx import example


def write(source: Source, file: Path) -> Engine:
    """Write a .pt2 file for any batch and any length of the model; its extra files are `Source.metadata`."""
    longest = source.head.config.max_positions
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("length", max=longest)}
    given = dict(zip(INPUTS, example(), strict=True))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch, about itself
        shapes = dict.fromkeys(INPUTS, axes)
        program = torch.export.export(to_export(source), (), given, dynamic_shapes=shapes)
        content = io.BytesIO()  # on a full disk, torch ends the process
        torch.export.save(program, content, extra_files=source.metadata())
        file.write_bytes(content.getvalue())
        return of_module(torch.export.load(file).module())
