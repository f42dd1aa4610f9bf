"""An agent of its own process with memory to read from: prints its place, then waits for the end of stdin.

python -m tests.transfer.nixl_peer NUM_BYTES
"""

import sys

import msgspec
import torch

from lightllm.transfer.nixl_agent import Agent

VALUE = 7


def main() -> None:
    agent = Agent("nixl", torch.device("cpu"))
    memory = agent.take(int(sys.argv[1]))
    memory.data.fill_(VALUE)
    print(msgspec.msgpack.encode(memory.place).hex(), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main()
