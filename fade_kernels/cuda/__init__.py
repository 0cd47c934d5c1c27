"""Kernels of CUDA tensors as compositions: of Triton kernels, csrc/cuda and the library's products.

One file for each group of operators; what chooses among paths: `choices.py`; who registers them: `registration.py`.
"""
