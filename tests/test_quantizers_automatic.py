"""The default algorithm: a layer at a time the best for its type, and at 8 bits the files of straight-through."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy
from torch import Tensor, nn

import qat
from qat.errors import CalibrationError, SpecError, StateError
from qat.files.evidence import frozen_record
from qat.formats import QUANTO
from qat.layers import quantized_layers
from qat.preparation import prepared_as
from qat.quantizers.learned_affine import LearnedRange
from qat.quantizers.straight_through import DynamicRange
from qat.starting import awaiting
from tests.helpers import same_bits
from tests.training_modules import INT4, INT8, UserModule, layers_of, loader, quantization, quiet_trainer

MIXED = qat.QuantSpec(weights="int4", overrides={"2": "int8", "3": "int2"}, dtype="float32")
X = torch.randn(16, 256, generator=torch.Generator().manual_seed(0))


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(256, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 8))


def train(model: nn.Module) -> list[float]:
    optimizer, losses = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3, weight_decay=0.1)), []
    for _ in range(3):
        loss = model(X).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("int2", qat.LearnedAffine(start="output")),
        ("int4", qat.LearnedAffine(start="output")),
        ("int8", qat.StraightThrough()),
        ("float8", qat.StraightThrough()),
    ],
)
def test_the_choice_for_each_type(weights: str, expected: qat.Algorithm) -> None:
    qtype = QUANTO.qtypes[weights]
    assert qat.Automatic().for_type(qtype) == expected
    general: dict[str, Any] = {"learn_activations": True, "gradient": "stable", "static_activations": ("head",)}
    chosen = qat.Automatic(**general).for_type(qtype)
    assert chosen == expected.model_copy(update=general)
    assert qat.Automatic(start="best").for_type(qtype) == expected.model_copy(
        update={"start": "best"} if qtype.bits < 8 else {}
    )


def test_others_are_their_own_choice_and_print_what_was_asked_for() -> None:
    algorithm = qat.LearnedAffine(start="hqq", gradient="stable")
    assert algorithm.for_type(QUANTO.qtypes["int8"]) is algorithm
    assert str(algorithm) == "LearnedAffine(gradient='stable', start='hqq')"
    assert (str(qat.Automatic()), str(qat.StraightThrough())) == ("Automatic()", "StraightThrough()")


def test_it_is_the_default_and_the_report_says_what_each_layer_got() -> None:
    model = network()
    report = qat.prepare(model, MIXED)
    assert prepared_as(model).algorithm == qat.Automatic()
    learned = qat.LearnedAffine(start="output")
    assert report.algorithms == {"0": learned, "2": qat.StraightThrough(), "3": learned}
    kinds = {name: type(layer.weight_quantizer) for name, layer in quantized_layers(model)}
    assert kinds == {"0": LearnedRange, "2": DynamicRange, "3": LearnedRange}
    *_, algorithms, waiting = str(report).splitlines()
    assert algorithms == (
        "algorithm: LearnedAffine(start='output') for int4, StraightThrough() for int8, "
        "LearnedAffine(start='output') for int2"
    )
    assert waiting == "2 layers begin with 'clip' until qat.calibrate(model, batches) gives their start"
    assert str(qat.prepare(network(), INT8)).splitlines()[-1] == "algorithm: StraightThrough() for int8"
    with torch.device("meta"):
        assert qat.prepare(network(), MIXED).waiting == 2


def test_data_gives_the_start_and_float_weights_stay() -> None:
    model = network()
    before = [p.detach().clone() for p in model.parameters()]
    report = qat.calibrate(model, [X], spec=MIXED)
    assert {name: start.start for name, start in report.starts.items()} == {"0": "output", "3": "output"}
    assert all(start.after < start.before for start in report.starts.values())
    names = dict(network().named_parameters())
    after = [p.detach() for name, p in model.named_parameters() if name in names]
    assert all(map(same_bits, after, before))
    assert not awaiting(model)


@pytest.mark.parametrize(
    ("trained", "told"), [(False, "2 layers are frozen as they start with 'clip'"), (True, "2 layers train from the")]
)
def test_without_data_one_line_says_so(trained: bool, told: str, caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    qat.prepare(model, MIXED)
    with caplog.at_level(logging.WARNING, logger="qat"):
        if trained:
            train(model)
        qat.freeze(model)
    (message,) = caplog.messages
    assert message.startswith(told)
    assert "call qat.calibrate(model, batches) before" in message


@pytest.mark.parametrize("weights", ["int8", "float8"])
@pytest.mark.parametrize("activations", [None, "same"])
def test_eight_bits_are_those_of_straight_through(weights: Any, activations: Any, tmp_path: Path) -> None:
    spec = qat.QuantSpec(weights=weights, activations=weights if activations else None)
    losses, files = [], []
    for name, algorithm in {"default": None, "named": qat.StraightThrough()}.items():
        model = network()
        qat.prepare(model, spec, algorithm=algorithm)
        qat.calibrate(model, [X])
        losses.append(train(model))
        keys = set(model.state_dict())
        qat.freeze(model)
        qat.export(model, tmp_path / name)
        files.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} | {"keys": keys})
    assert losses[0] == losses[1]
    assert files[0] == files[1]


def test_the_record_names_what_was_used_and_codes_train_on() -> None:
    model = network()
    qat.prepare(model, MIXED)
    train(model)
    qat.freeze(model)
    assert frozen_record(model).algorithm == "learned_affine, straight_through"
    qat.fix_codes(model)
    assert prepared_as(model).algorithm == qat.Automatic()
    train(model)
    qat.freeze(model)
    assert frozen_record(model).algorithm == "learned_affine, straight_through"


def test_decay_of_learned_ranges_names_the_remedy() -> None:
    model = network()
    qat.prepare(model, INT4)
    optimizer = torch.optim.AdamW(model.parameters())
    model(X).sum().backward()
    with pytest.raises(qat.TrainingError, match=r"6 learned ranges sit in a group .* qat\.parameter_groups"):
        optimizer.step()


def test_a_callback_and_a_preparation_without_an_algorithm_agree(tmp_path: Path) -> None:
    module = UserModule()
    qat.prepare(module.model, INT4)
    quiet_trainer(tmp_path, quantization(INT4), max_steps=1).fit(module, loader())
    assert all(bool(layer.weight_quantizer.started) for layer in layers_of(module))
    other = UserModule()
    qat.prepare(other.model, INT4, algorithm=qat.StraightThrough())
    with pytest.raises(StateError, match=r"already prepared with .*StraightThrough.*but the callback has .*Automatic"):
        quiet_trainer(tmp_path, quantization(INT4)).fit(other, loader())


def test_the_default_needs_no_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="qat"):
        callback = quantization(INT4, calibration_batches=0)
        quiet_trainer(tmp_path, callback, max_steps=2).fit(UserModule(), loader())
    (told,) = [message for message in caplog.messages if "clip" in message]
    assert told.startswith(
        "3 layers begin with the start 'clip', for theirs needs data: set calibration_batches above 0"
    )


class Sharding(SingleDeviceStrategy):
    """Says that it shards weights."""

    restore_checkpoint_after_setup = True


def test_sharded_weights_begin_without_data(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = UserModule()
    with caplog.at_level(logging.WARNING, logger="qat"):
        quiet_trainer(tmp_path, quantization(INT4), max_steps=2, strategy=Sharding("cpu")).fit(module, loader())
    told = [message for message in caplog.messages if "clip" in message]
    assert told == ["3 layers begin with the start 'clip', for theirs needs data: weights are sharded"]
    assert len(module.losses) == 2


class Parts(nn.Module):
    """A model without a forward of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(32, 4)


class OfParts(UserModule):
    def __init__(self) -> None:
        super().__init__(Parts())

    def loss(self, batch: list[Tensor]) -> Tensor:
        return nn.functional.cross_entropy(self.model.first(batch[0]), batch[1])  # type: ignore[operator, union-attr]


def test_a_model_that_cannot_be_called_trains_all_the_same(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = OfParts()
    with caplog.at_level(logging.WARNING, logger="qat"):
        quiet_trainer(tmp_path, quantization(INT4), max_steps=2).fit(module, loader())
    assert "begin with the start 'clip', for theirs needs data: batches: the model cannot run batch 0" in caplog.text
    assert len(module.losses) == 2
    for asked in (qat.LearnedAffine(start="output"), qat.Automatic(start="best")):
        with pytest.raises(CalibrationError, match="the model cannot run batch 0"):
            quiet_trainer(tmp_path, quantization(INT4, asked)).fit(OfParts(), loader())


def test_a_batch_of_nan_is_an_error_and_no_reason_to_begin_without_data(tmp_path: Path) -> None:
    class Spoilt(UserModule):
        def model_inputs(self, batch: list[Tensor]) -> Tensor:
            return batch[0] * float("nan")

    with pytest.raises(CalibrationError, match="give inf or NaN"):
        quiet_trainer(tmp_path, quantization(INT4)).fit(Spoilt(), loader())


def test_an_unknown_start_is_refused() -> None:
    with pytest.raises(SpecError, match="Automatic: start: Input should be 'minmax', 'clip'"):
        qat.Automatic(start="magic")  # type: ignore[arg-type]
