"""Measures a running server: `python benchmark_client.py --num_clients 100 --input_num 2000 --url URL`.

The same program as `lightllm bench`; works with the package installed and in a bare checkout.
"""

import sys
from pathlib import Path

try:
    from lightllm.__main__ import main
except ModuleNotFoundError as exc:
    if exc.name != "lightllm":
        raise
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from lightllm.__main__ import main

if __name__ == "__main__":
    sys.exit(main(["bench", *sys.argv[1:]]))
