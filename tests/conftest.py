"""Every test runs with the shapes and types in all signatures of the library checked, on one thread, offline."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a process for each core
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

from jaxtyping import install_import_hook  # noqa: E402

install_import_hook(["rlhf", "support"], "beartype.beartype")

import pytest  # noqa: E402

from support import runs  # noqa: E402


@pytest.fixture(autouse=True)
def no_locks_of_other_tests():
    """A process that fails ends, and so do its locks; tests go on in the same process."""
    yield
    for out in [*runs.LOCKS]:
        runs.unlock(out)
