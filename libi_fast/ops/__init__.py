"""Operators: argument checks, autograd, vmap and choice of backend over the kernels."""
