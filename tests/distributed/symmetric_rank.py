"""One of two ranks, each a process with its own GPU: `python -m tests.distributed.symmetric_rank RANK FILE`.

Prints a line of JSON for each sum: what was added and how, the largest difference from the plain sum, and
whether this rank's bits are the leader's.
"""

import json
import sys
from pathlib import Path

import torch

from lightllm.distributed.collectives import connect, file_store
from lightllm.distributed.symmetric_memory import (
    BOX_BYTES,
    SymmetricMemoryCollectives,
    one_shot,
    over_symmetric_memory,
    two_shot,
)

LENGTHS = (8, 4096, 65536, 1 << 20)


def main(rank: int, path: str) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    store = file_store(Path(path), 2)
    nccl = connect(store, rank, 2, "127.0.0.1", device)
    symmetric = over_symmetric_memory(nccl, store)
    assert isinstance(symmetric, SymmetricMemoryCollectives), "the two cannot reach each other's memory"
    ways = {
        "one shot": lambda x: one_shot(symmetric._box, x),
        "two shots": lambda x: two_shot(symmetric._box, x),
        "as measured": symmetric.all_reduce,
    }
    for dtype in (torch.float32, torch.bfloat16):
        for length in LENGTHS:
            generators = [torch.Generator(device).manual_seed(7 * length + r) for r in range(2)]
            parts = [torch.randn(length, device=device, generator=g).to(dtype) for g in generators]
            for name, way in ways.items():
                if length * dtype.itemsize > BOX_BYTES:
                    continue
                x = parts[rank].clone()
                way(x)
                leaders = x.clone()
                nccl.broadcast(leaders)
                found = {
                    "what": f"{name}, {length} of {dtype}",
                    "difference": (x.float() - (parts[0] + parts[1]).float()).abs().max().item(),
                    "is_leaders": torch.equal(x, leaders),
                }
                print(json.dumps(found), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
