"""ONNX files: a graph of operators becomes a torch module, which torch.export captures like any other.

Its tensors of floating-point numbers are parameters, and so secret; its integers, single numbers and attributes are
public. What depends on known values and shapes alone is computed here, or while the module is traced.
"""

from mpcinfer.models.onnx.loader import load

__all__ = ["load"]
