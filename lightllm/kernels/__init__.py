"""Kernels: one operation a file, torch and triton only; `ref` has the plain version of every one of them."""
