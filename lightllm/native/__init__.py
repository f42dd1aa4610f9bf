"""C kernels for the CPU: sources in src/, built with the package where there is a compiler.

Optional: without them everything runs in plain torch, which is also their oracle in the tests.
"""
