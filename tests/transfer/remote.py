"""Ends of KV links in a process of their own, for lanes that need two."""

from multiprocessing.managers import BaseManager

from tests.transfer.nodes import End


class Nodes(BaseManager):
    """Makes ends there; what comes back has the methods of an End."""


Nodes.register("End", End)
