"""Which sequences of a batch go to which kernels. Plain integers; no device, no kernels."""

import numpy as np


def long_span(query_lens: np.ndarray, long_query_len: int) -> slice | None:
    """The neighbours from the first to the last sequence with at least `long_query_len` new tokens.

    A kernel that takes them as one piece needs no copies. Shorter ones between them go along: the scheduler
    puts decodes before all prompts, so these are a few short prompts at most.

    Args:
        query_lens: [n] new tokens of each sequence.

    Returns:
        Their places in the batch; None if there is no long one.
    """
    places = np.flatnonzero(query_lens >= long_query_len)
    return slice(int(places[0]), int(places[-1]) + 1) if len(places) else None
