"""A trained model as one file for another engine: ONNX Runtime, OpenVINO, torch.export, or a server for BERT.

from electra_fast.export import export
export("runs/banking", "onnx", "runs/banking.onnx", int8=True)
"""

from electra_fast.export.exporting import FORMATS, Export, export

__all__ = ["FORMATS", "Export", "export"]
