"""Settings of every test process: one compute thread, no network, nothing inherited from the shell.

Runs before torch is imported, because OpenMP reads its variable once.
"""

import os

from hypothesis import HealthCheck, settings

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
for name in [name for name in os.environ if name.startswith("LIGHTLLM_") or name == "LOADWORKER"]:
    del os.environ[name]

# A shared or busy machine must not decide whether a test passes, and a failure must come again.
settings.register_profile(
    "lightllm", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("lightllm")
