"""Quantization of linear layers: formats, methods and kernels.

Knows tensors and nn.Linear, nothing of language models, and imports only torch (and triton where
it is present).
"""
