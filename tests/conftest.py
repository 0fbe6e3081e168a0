"""What holds for every test.

No network, a data cache of its own, one thread, a terminal of one width, a fixed seed;
hypothesis without a clock or a memory.
"""

from __future__ import annotations

import gc
import os
import sys
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
    _take_away_the_plugin_for_diffusers()
    gc.freeze()


def _take_away_the_plugin_for_diffusers() -> None:
    """Collecting doctests has imported it, and stock code is what the other tests are about."""
    if plugin := sys.modules.get("qat.integrations.diffusers"):
        from diffusers.loaders import single_file_model
        from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
        from diffusers.quantizers.quanto import QuantoQuantizer

        AUTO_QUANTIZER_MAPPING["quanto"] = QuantoQuantizer
        single_file_model._should_convert_state_dict_to_diffusers = plugin._stock_needs_conversion


def pytest_unconfigure() -> None:
    _datasets_cache.cleanup()


@pytest.fixture(autouse=True)
def _fixed_seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exports of recipes are verified in this process: a fresh one takes five seconds, and has tests of its own."""
    import qat

    verify = qat.verify
    monkeypatch.setattr(qat, "verify", lambda at, **options: verify(at, **(options | {"fresh_process": False})))
