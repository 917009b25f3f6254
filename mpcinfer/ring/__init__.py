"""Arithmetic of Z_2^64 on tensors: codec, kernels, random streams, sharing; no communication and no protocol."""
