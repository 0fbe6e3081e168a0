"""`qat.QuantizationSteps` in loops of one's own: with accelerate's checkpoints, evaluations, and what it refuses."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import qat
from tests.language_models import GPTQ, INT4_INT8, How, accelerated, loader, optimizer_of, prepared
from tests.training_modules import INT4, INT8_INT8, Tiny, assert_equal_state, inputs_of, layers_of
from tests.training_modules import loader as rows

INT2 = How(
    INT4_INT8.model_copy(update={"weights": "int2", "activations": None}),
    GPTQ,
    qat.QuantizationSchedule(calibration_batches=2, first_weights="int4", first_weights_until=5, hold_scales_from=6),
)
OBSERVED = How(schedule=qat.QuantizationSchedule(calibration_batches=2, observe_from=1, observe_until=6))


@pytest.mark.parametrize("how", [INT2, OBSERVED], ids=["int4 first, held", "observed activations"])
def test_a_loop_with_accelerate_is_resumed_exactly(how: How, tmp_path: Path) -> None:
    whole, losses = accelerated(how, tmp_path, save_at=3)
    resumed, later = accelerated(how, tmp_path, resume=True)
    assert losses == losses[:3] + later
    assert_equal_state(resumed, whole)


def test_calls_out_of_order_are_refused() -> None:
    model = prepared(INT2)
    training, optimizer = qat.QuantizationSteps(model, INT2.schedule, loader()), optimizer_of(model)
    for call in (training.before_step, training.after_step):
        with pytest.raises(qat.TrainingError, match=r"steps: the schedule has not begun: call begin\("):
            call()
    with pytest.raises(qat.TrainingError, match=r"must be optimizers of torch, got a dict: pass \[optimizer\]"):
        training.begin(optimizer.param_groups, steps=8)
    training.begin(optimizer, steps=8)
    with pytest.raises(qat.TrainingError, match="steps: after_step came without before_step"):
        training.after_step()
    training.before_step()
    training.load_state_dict({"step": 3})
    with pytest.raises(qat.TrainingError, match="and again after load_state_dict or end"):
        training.after_step()


def tiny(spec: qat.QuantSpec = INT4, algorithm: qat.Algorithm | None = None) -> Tiny:
    torch.manual_seed(1)
    model = Tiny()
    qat.prepare(model, spec, algorithm=algorithm)
    return model


def sgd(model: nn.Module, **options: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(qat.parameter_groups(model, lr=1e-2), **options)


def test_an_evaluation_sees_what_is_served_and_training_goes_on() -> None:
    model = tiny(INT8_INT8)
    schedule = qat.QuantizationSchedule(start_step=2, observe_from=1, observe_until=2)
    training = qat.QuantizationSteps(model, schedule, inputs_of(rows()))
    training.begin([sgd(model)], steps=4)
    seen = []
    for _ in range(3):
        training.before_step()
        seen.append(layers_of(model)[0].mode[:3])
        training.after_step()
        with training.evaluating():
            assert layers_of(model)[0].mode[:3] == (True, True, False)
    assert seen == [(False, True, False), (False, True, True), (True, True, False)]
    training.end()
    assert all(layer.mode.weights and not layer.mode.observe for layer in layers_of(model))


def test_the_last_scales_are_taken_though_an_evaluation_came_between() -> None:
    model = tiny(INT8_INT8)
    schedule = qat.QuantizationSchedule(observe_from=0, observe_until=100, calibration_batches=1)
    training = qat.QuantizationSteps(model, schedule, inputs_of(rows()))
    training.begin([sgd(model)])
    for number, batch in enumerate(inputs_of(rows(20))):
        training.before_step()
        model(batch * (1 + number))
        training.after_step()
    training.judge()
    training.end()
    for layer in layers_of(model):
        scale = layer.input_quantizer.scale.clone()
        layer.input_quantizer.refresh()
        assert torch.equal(layer.input_quantizer.scale, scale)


def test_what_cannot_work_is_refused_before_the_first_step() -> None:
    with pytest.raises(qat.StateError, match="model: was not prepared"):
        qat.QuantizationSteps(Tiny()).begin([])
    model = tiny(INT8_INT8)
    with pytest.raises(qat.CalibrationError, match="nothing sets their scales"):
        qat.QuantizationSteps(model).begin([sgd(model)])
    model = tiny(INT4, qat.LearnedAffine())
    with pytest.raises(qat.TrainingError, match=r"learned ranges sit in a group with weight_decay=0\.1"):
        qat.QuantizationSteps(model).begin([torch.optim.SGD(model.parameters(), lr=0.1, weight_decay=0.1)])
    with pytest.raises(qat.TrainingError, match="does not hold 6 of 6 learned scales"):
        qat.QuantizationSteps(model).begin([torch.optim.SGD([model.head.weight], lr=0.1)])
    schedule = qat.QuantizationSchedule(cage=1.0)
    with pytest.raises(qat.TrainingError, match=r"cage=1\.0 needs the number of steps"):
        qat.QuantizationSteps(model, schedule).begin([sgd(model)])
    schedule = qat.QuantizationSchedule(first_weights="int4", first_weights_until=1)
    with pytest.raises(qat.TrainingError, match="first_weights needs whole weights, which FSDP shards: use ddp"):
        qat.QuantizationSteps(model, schedule, sharded="FSDP").begin([sgd(model)])


def test_a_second_run_begins_anew_and_leaves_no_hook() -> None:
    model = tiny(INT4, qat.LearnedAffine())
    optimizer = sgd(model)
    training = qat.QuantizationSteps(torch.compile(model), qat.QuantizationSchedule(cage=1.0))
    for _ in range(2):
        training.begin([optimizer], steps=2)
        assert len(optimizer._optimizer_step_post_hooks) == 1
    training.close()
    assert not optimizer._optimizer_step_post_hooks


def test_it_loads_no_lightning() -> None:
    code = (
        "import sys, qat; qat.QuantizationSteps; import qat.integrations.trainer; assert 'lightning' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
