"""Attention over the KV pool: one backend a file, chosen by name in `registry`."""
