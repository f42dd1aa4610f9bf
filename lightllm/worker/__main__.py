"""`python -m lightllm.worker`: one rank as a process of its own, its configuration as msgpack on stdin.

What it assembles, and from what, is server/worker_main.py's business.
"""


def main() -> int:
    """Compute until the owner goes; returns the exit code."""
    from lightllm.server.worker_main import main as run

    return run()


if __name__ == "__main__":
    raise SystemExit(main())
