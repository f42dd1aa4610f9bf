"""The scheduler: which tokens of which requests are computed in the next step, and in which KV slots.

Pure CPU and plain integers: no torch, no asyncio, no clock of its own. Runs in the engine process.
Read scheduler.py first, then request.py, cache.py, radix_tree.py and slots.py; policy.py orders the waiting.
"""
