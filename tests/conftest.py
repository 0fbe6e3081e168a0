"""What holds for every test.

No network, a data cache of its own, one thread, a terminal of one width, a fixed seed;
hypothesis without a clock or a memory.
"""

from __future__ import annotations

import gc
import os
import tempfile

_datasets_cache = tempfile.TemporaryDirectory(prefix="qat-tests-", ignore_cleanup_errors=True)
os.environ["HF_DATASETS_CACHE"] = _datasets_cache.name
os.environ["COLUMNS"] = "160"  # tables break their lines alike in every terminal and under xdist
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # forked data workers would warn

import pytest
import torch
from hypothesis import settings

pytest.register_assert_rewrite("tests.helpers")

torch.set_num_threads(1)

# A test that fails must fail again, on a slow machine too.
settings.register_profile("qat", derandomize=True, deadline=None, database=None)
settings.load_profile("qat")


def pytest_collection_finish() -> None:
    """Collecting garbage, as accelerate does around each training, takes half a second for what imports have made."""
    gc.freeze()


def pytest_unconfigure() -> None:
    _datasets_cache.cleanup()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)
