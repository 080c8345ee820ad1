"""Batches of the embedded model; those that run it need the extra `server`."""

import importlib.util

SERVER = ("fastapi", "multipart", "llguidance", "prometheus_client", "httpx", "torch")
if any(importlib.util.find_spec(name) is None for name in SERVER):
    collect_ignore_glob = ["test_batch_command.py", "test_worker.py"]
