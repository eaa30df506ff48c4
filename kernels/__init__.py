"""The compute: one operation, one folder, three implementations of the same formula.

`reference.py` is the specification in plain torch, `gpu.py` the Triton kernel, `cpu.cpp` the C++ one (reached
through `libi_fast.kernels.cpu`). Nothing here knows of models or training.
"""
