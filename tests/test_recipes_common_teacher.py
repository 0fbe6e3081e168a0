"""Teachers that cannot teach are told before any training, with what to change."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import default_collate

import qat
from recipes import causal_lm, text_to_image
from recipes.common.batches import TrainingBatches
from recipes.common.config import ConfigError
from recipes.common.training import require_teacher
from recipes.tasks import CausalLanguageModelling
from tests.test_training_teacher import Tokens

LOGITS_ALONE = qat.Distillation()


def rows(seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [{"input_ids": torch.randint(0, 11, (6,), generator=generator)} for _ in range(8)]


@pytest.fixture
def cache(tmp_path: Path) -> qat.CachedLogits:
    return qat.cache_logits(Tokens(), [default_collate(rows(0))], tmp_path / "cache", top_k=4)


def check(teacher: Any, how: qat.Distillation, seed: int = 0, student: Any = None) -> None:
    batches = TrainingBatches(rows(seed), 4)  # type: ignore[arg-type]
    require_teacher(student or Tokens(), teacher, how, CausalLanguageModelling(), batches)


def test_the_default_of_causal_lm_names_the_option_that_a_cache_needs(cache: qat.CachedLogits) -> None:
    how = causal_lm.Config().optimization.distillation
    with pytest.raises(
        ConfigError, match=r"cache' holds logits .* pass --optimization\.distillation\.hidden-states 0,"
    ):
        check(cache, how)
    softened = how.model_copy(update={"temperature": 2.0})
    with pytest.raises(ConfigError, match=r"hidden_states and temperature cannot .*states 0 --\S+\.temperature 1, or"):
        check(cache, softened)
    check(cache, LOGITS_ALONE)
    check(cache, softened.model_copy(update={"weight": 0.0}))  # a fit does not ask the teacher then


def test_a_cache_of_other_data_or_classes_is_told_by_a_first_batch(cache: qat.CachedLogits) -> None:
    with pytest.raises(qat.TrainingError, match=r"was made of other data: it lacks 4 of 4 rows"):
        check(cache, LOGITS_ALONE, seed=1)
    with pytest.raises(qat.TrainingError, match=r"of 11 classes, but the student has 13"):
        check(cache, LOGITS_ALONE, student=Tokens(13))


def test_no_cache_serves_text_to_image(cache: qat.CachedLogits) -> None:
    with pytest.raises(qat.TrainingError, match="give the teacher's model"):
        require_teacher(Tokens(), cache, text_to_image.Config().optimization.distillation)


def test_a_model_that_does_not_fit_is_told_and_one_that_fits_draws_no_random_number() -> None:
    student, teacher, other = Tokens().eval(), Tokens(), Tokens(13)
    state = torch.get_rng_state()
    check(teacher, LOGITS_ALONE, student=student)
    check(None, LOGITS_ALONE, student=student)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(qat.TrainingError, match="give a teacher with the student's vocabulary"):
        check(other, LOGITS_ALONE, student=student)
