"""Steps that a user gets wrong with checkpoints and batches: each is told with its remedy."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import qat
from qat.runs import run_state
from tests.training_modules import (
    INT4,
    INT8_INT8,
    UserModule,
    assert_equal_state,
    layers_of,
    loader,
    quantization,
    quiet_trainer,
)

pytestmark = pytest.mark.compatibility

LEARNED = qat.LearnedAffine()


class Prepared(UserModule):
    """Prepared in its ``__init__``, as the error advises."""

    def __init__(self) -> None:
        super().__init__()
        qat.prepare(self.model, INT4, algorithm=LEARNED)


def saved(directory: Path, *callbacks: Any) -> tuple[UserModule, Path]:
    module = UserModule()
    trainer = quiet_trainer(directory, *callbacks, max_steps=2)
    trainer.fit(module, loader())
    trainer.save_checkpoint(directory / "saved.ckpt")
    return module, directory / "saved.ckpt"


def test_load_from_checkpoint_into_a_float_module_says_how(tmp_path: Path) -> None:
    module, path = saved(tmp_path, quantization(INT4, LEARNED))
    rule = (
        r'state_dict: "the checkpoint holds other quantizers than the module: call qat.prepare\(self.model, spec, '
        r'algorithm=\.\.\.\) in its __init__, .* or pass ckpt_path to a Trainer .*", "model\.first\.weight_quantizer\.'
    )
    with pytest.raises(RuntimeError, match=rule):
        UserModule.load_from_checkpoint(path, weights_only=True)
    with pytest.raises(RuntimeError, match=rule):
        quiet_trainer(tmp_path).test(UserModule(), loader(), ckpt_path=path, weights_only=True)
    assert_equal_state(Prepared.load_from_checkpoint(path, weights_only=True), module)
    again = UserModule()
    quiet_trainer(tmp_path, quantization(INT4, LEARNED)).predict(again, loader(), ckpt_path=path, weights_only=True)
    assert_equal_state(again, module)


@pytest.mark.filterwarnings("ignore:Found keys that are not in the model:UserWarning")
def test_the_masters_alone_can_be_loaded_into_a_float_module(tmp_path: Path) -> None:
    module, path = saved(tmp_path, quantization(INT4, LEARNED))
    masters = UserModule.load_from_checkpoint(path, strict=False, weights_only=True)
    assert torch.equal(masters.model.first.weight, module.model.first.weight)
    assert layers_of(masters) == []


@pytest.mark.parametrize(
    ("spec", "algorithm", "message"),
    [
        (INT4, qat.StraightThrough(), r"other quantizers than the module: .*that run's QuantizationAwareTraining"),
        (
            INT8_INT8,
            LEARNED,
            r"3 layers .*: int4 there, int8 here, .*head: .*\): prepare the model",
        ),
    ],
    ids=["another algorithm", "another type"],
)
def test_a_checkpoint_of_another_preparation_says_so(
    spec: qat.QuantSpec, algorithm: Any, message: str, tmp_path: Path
) -> None:
    _, path = saved(tmp_path, quantization(INT4, LEARNED))
    with pytest.raises(RuntimeError, match=message):
        quiet_trainer(tmp_path, quantization(spec, algorithm)).fit(
            UserModule(), loader(), ckpt_path=path, weights_only=True
        )


def test_a_checkpoint_tells_its_preparation_and_another_is_refused_with_a_list(tmp_path: Path) -> None:
    _, path = saved(tmp_path, quantization(INT4, qat.StraightThrough()))
    told = torch.load(path, weights_only=True)["quantization"]["prepared"]
    assert (told["spec"]["weights"], told["algorithm"]["kind"]) == ("int4", "straight_through")
    other = quantization(INT4.model_copy(update={"weights": "int8", "exclude": ("head",)}), qat.StraightThrough())
    listed = r"weights: 'int4' there, 'int8' here; exclude: \[\] there, \['head'\] here: use one"
    with pytest.raises(qat.StateError, match=rf"ckpt_path: .* was prepared in another way: {listed}"):
        quiet_trainer(tmp_path, other).fit(UserModule(), loader(), ckpt_path=path, weights_only=True)


@pytest.mark.parametrize("steps", [2, 4], ids=["no step is left", "two steps are left"])
def test_what_is_known_of_runs_outlives_a_checkpoint(steps: int, tmp_path: Path) -> None:
    _, path = saved(tmp_path, quantization(INT4, LEARNED))
    whole, resumed = UserModule(), UserModule()
    quiet_trainer(tmp_path, quantization(INT4, LEARNED), max_steps=steps).fit(whole, loader())
    trainer = quiet_trainer(tmp_path, quantization(INT4, LEARNED), max_steps=steps)
    trainer.fit(resumed, loader(), ckpt_path=path, weights_only=True)
    assert run_state(resumed.model) == run_state(whole.model)
    assert {tuple(found) for found in run_state(whole.model)["layers"].values()} == {(True, 2)}


@pytest.mark.parametrize("before", [[], [quantization(INT4, qat.StraightThrough())]], ids=["float", "straight through"])
def test_a_fit_does_not_go_on_from_an_optimizer_without_the_learned_ranges(before: Any, tmp_path: Path) -> None:
    old, path = saved(tmp_path, *before)
    with pytest.raises(qat.TrainingError, match=r"ckpt_path: the checkpoint has no learned ranges, .* for the 6 of"):
        quiet_trainer(tmp_path, quantization(INT4, LEARNED), max_steps=4).fit(
            UserModule(), loader(), ckpt_path=path, weights_only=True
        )
    module = UserModule()  # the remedy
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert torch.equal(module.model.first.weight, old.model.first.weight)
    quiet_trainer(tmp_path, quantization(INT4, LEARNED), max_steps=2).fit(module, loader())
    trainer = quiet_trainer(tmp_path, quantization(INT4, LEARNED))
    trainer.predict(UserModule(), loader(), ckpt_path=path, weights_only=True)  # judging them is no fit


def test_a_float_checkpoint_goes_on_where_nothing_is_learned(tmp_path: Path) -> None:
    _, path = saved(tmp_path)
    module = UserModule()
    trainer = quiet_trainer(tmp_path, quantization(INT8_INT8), max_steps=4, max_epochs=3)
    trainer.fit(module, loader(), ckpt_path=path, weights_only=True)
    assert len(module.losses) == 2
    assert all(bool(layer.output_quantizer.initialized) for layer in layers_of(module))


def test_a_module_without_quantization_loads_and_pickles_as_ever(tmp_path: Path) -> None:
    module, path = saved(tmp_path)
    assert_equal_state(UserModule.load_from_checkpoint(path, weights_only=True), module)
    copy = pickle.loads(pickle.dumps(UserModule()))
    copy.load_state_dict(module.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        copy.load_state_dict({**module.state_dict(), "model.other": torch.zeros(1)})


class Named(UserModule):
    """Its batches are dicts with names that the model does not know."""

    def loss(self, batch: Any) -> torch.Tensor:
        return nn.functional.cross_entropy(self.model(batch["x"]), batch["y"])


def named_batches() -> DataLoader[Any]:
    rows = [{"x": x, "y": y} for x, y in loader().dataset]
    return DataLoader(rows, batch_size=4)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("convert", "found"),
    [(None, "TypeError: .*unexpected keyword argument"), (lambda batch: batch["z"], "KeyError: 'z'")],
    ids=["by default", "by a wrong function"],
)
def test_batches_that_do_not_fit_the_model_ask_for_model_inputs(convert: Any, found: str, tmp_path: Path) -> None:
    module = Named()
    with pytest.raises(qat.CalibrationError, match=rf"model_inputs: .* {found}.*: pass model_inputs"):
        quiet_trainer(tmp_path, quantization(INT8_INT8, model_inputs=convert), limit_val_batches=0).fit(
            module, named_batches()
        )
    assert module.losses == []
    callback = quantization(INT8_INT8, model_inputs=lambda batch: batch["x"])
    quiet_trainer(tmp_path, callback, max_steps=1, limit_val_batches=0).fit(module, named_batches())


def test_a_prepared_layer_takes_its_input_by_name_as_a_float_one_does() -> None:
    model = nn.Sequential(nn.Linear(64, 8))
    qat.prepare(model, INT4)
    x = torch.randn(2, 64)
    assert torch.equal(model[0](input=x), model[0](x))
