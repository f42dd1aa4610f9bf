"""The C kernels for tests; without a compiler they were not built, and what needs them is skipped."""

import pytest

from lightllm.native.library import NativeLibrary, NativeUnavailable


def library_or_skip(num_threads: int = 2, kernels: str | None = None) -> NativeLibrary:
    try:
        return NativeLibrary(num_threads, kernels)
    except NativeUnavailable as error:
        pytest.skip(str(error))
