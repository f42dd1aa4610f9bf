"""Long lists of token ids and slots as packed 32-bit integers: one object for all, one copy for a slice.

L0. A list of Python ints costs a loop over all of them wherever it is made, checked, encoded and decoded, and
whoever else runs on that loop stands still meanwhile; of an array all this is a copy of memory. On the wire
it is one run of bytes, 4 for each number, little endian as all machines that this runs on are.
"""

from array import array
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    Ints = array[int]
else:  # the class itself, which cannot be subscripted at run time
    Ints = array


def pack(values: Iterable[int] = ()) -> Ints:
    """The numbers as an array; an array is returned as it is.

    Raises:
        OverflowError: a number that does not fit into 32 bits.
    """
    return values if type(values) is array else array("i", values)


def bounds(values: Ints) -> tuple[int, int]:
    """The least and the largest of the numbers, of which there is at least one."""
    view = np.frombuffer(values, dtype=np.int32)
    return int(view.min()), int(view.max())


def to_wire(value: Any) -> memoryview:
    """For msgspec's encoders: the bytes of an array."""
    if type(value) is not array:
        raise NotImplementedError(f"{type(value).__name__} is not sent")
    return memoryview(value).cast("B")


def from_wire(kind: Any, value: Any) -> Ints:
    """For msgspec's decoders: an array of its bytes, or of a list of numbers.

    Raises:
        ValueError, TypeError: neither of the two, or a number that does not fit.
    """
    if kind is not array:
        raise TypeError(f"{kind} is not read")
    if type(value) is list:
        try:
            return array("i", value)
        except OverflowError as error:
            raise ValueError(str(error)) from error
    packed = array("i")
    packed.frombytes(value)
    return packed
