from __future__ import annotations

from typing import Any

import pytest
from pydantic import ValidationError

from recipes.data.settings import Count, Settings, Whole


class Section(Settings):
    count: Count = 1
    whole: Whole = 0
    rate: float = 0.5


@pytest.mark.parametrize(
    "given",
    [{"count": 0}, {"count": 2**31}, {"whole": -1}, {"rate": float("nan")}, {"rate": float("inf")}, {"other": 1}],
    ids=str,
)
def test_what_no_machine_can_hold_is_refused(given: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Section(**given)


def test_the_rest_is_taken() -> None:
    assert Section(count=2**31 - 1, whole=0, rate=1e-9).count == 2**31 - 1
