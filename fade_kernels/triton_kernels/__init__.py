"""Triton kernels, one file each: the derivation, the kernel, its tilings, its launcher.

Apart from the operators because importing this package imports Triton; `fade_kernels/cuda` does so on the first call on
a CUDA device. Definitions: `fade_kernels/reference.py`. How the names read:
`i_*` program and block indices, `o_*` offsets, `m_*` masks, `p_*` pointers, `b_*` blocks in registers, `T, N, K, R`
sizes, `BT, BN, BK, BR` tiles.
"""
