"""Every test runs with the shapes and types in all signatures of the library checked, on one thread, offline."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a process for each core
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(["rlhf", "support"], "beartype.beartype")
