from __future__ import annotations

import torch

from recipes.data.tensors import move


def test_moving_reaches_what_is_nested_and_casts_no_scalars() -> None:
    moved = move(
        {"a": {"b": [torch.ones(2, 2), "text"]}, "time": torch.ones(2), "ids": torch.ones(2, 2, dtype=torch.long)},
        torch.device("meta"),
        torch.bfloat16,
    )
    assert moved["a"]["b"][0].dtype is torch.bfloat16
    assert moved["a"]["b"][0].is_meta
    assert moved["a"]["b"][1] == "text"
    assert moved["time"].dtype is torch.float32
    assert moved["time"].is_meta
    assert moved["ids"].dtype is torch.int64


def test_a_copy_shares_no_memory() -> None:
    kept = torch.ones(2, 2)
    same, copied = (move((kept,), torch.device("cpu"), copy=copy)[0] for copy in (False, True))
    kept.zero_()
    assert not same.any()
    assert copied.all()
