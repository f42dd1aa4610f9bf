"""Which sequences are given to the kernels for long prompts."""

import numpy as np
import pytest

from lightllm.attention.spans import long_span


@pytest.mark.parametrize(
    ("query_lens", "expected"),
    [
        ([1, 1, 1], None),
        ([1, 255], None),
        ([256], slice(0, 1)),
        ([1, 1, 300, 256], slice(2, 4)),
        ([1, 30, 300, 5], slice(2, 3)),
        ([1, 300, 20, 1, 400, 5], slice(1, 5)),
    ],
)
def test_from_the_first_long_one_to_the_last(query_lens: list[int], expected: slice | None) -> None:
    assert long_span(np.array(query_lens), 256) == expected
