"""The Trainer of transformers and TRL's: they train what a plain loop trains, resume exactly, and export it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import lightning
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, models
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast, Trainer, TrainingArguments
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import add_fused_lm_head

import qat
from qat.integrations.trainer import QuantizationCallback, grouped_optimizer
from tests.language_models import (
    GPTQ,
    INT4,
    INT4_INT8,
    ROWS,
    How,
    Losses,
    accelerated,
    huggingface,
    llama,
    loader,
    optimizer_of,
    options,
    plain_loop,
    prepared,
)
from tests.training_modules import assert_equal_state, quiet_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning"),
]


def by_transformers(directory: Path, how: How) -> tuple[Any, list[float]]:
    return huggingface(directory, how)[:2]


def by_accelerate(directory: Path, how: How) -> tuple[Any, list[float]]:
    return accelerated(how, directory)  # type: ignore[no-any-return]


def by_lightning(directory: Path, how: How) -> tuple[Any, list[float]]:
    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.losses = llama(), []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            loss: torch.Tensor = self.model(**batch).loss
            self.losses.append(loss.item())
            return loss

        def configure_optimizers(self) -> Any:
            return optimizer_of(self.model)

    module = Module()
    callback = qat.QuantizationAwareTraining(
        how.spec, how.algorithm, how.schedule, target="transformers", model_inputs=lambda batch: batch
    )
    quiet_trainer(directory, callback, max_steps=8).fit(module, loader())
    return module.model, module.losses


def by_trl(directory: Path, how: How, **callback: Any) -> tuple[Any, list[float]]:
    words = Tokenizer(models.WordLevel({str(word): word for word in range(64)}, unk_token="0"))
    arguments = SFTConfig(str(directory), bf16=False, gradient_checkpointing=False, **options())
    model, noted = llama(), Losses()
    SFTTrainer(
        model,
        arguments,
        train_dataset=datasets.Dataset.from_list([{"input_ids": row["input_ids"].tolist()} for row in ROWS]),
        processing_class=PreTrainedTokenizerFast(tokenizer_object=words, pad_token="0", eos_token="1"),
        callbacks=[QuantizationCallback(how.spec, how.algorithm, how.schedule, **callback), noted],
        optimizer_cls_and_kwargs=grouped_optimizer(arguments),
    ).train()
    return model, noted.losses


def plain_loop_as_trl(how: How) -> tuple[Any, list[float]]:
    """TRL computes the loss from the head's weight in pieces, which rounds in another way."""

    def loss_of(model: Any, batch: Any) -> torch.Tensor:
        mask = torch.ones_like(batch["input_ids"])
        outputs = model(**batch, attention_mask=mask, use_cache=False, fused_lm_head=True)
        loss: torch.Tensor = -outputs.log_probs.sum() / outputs.label_mask.sum()
        return loss

    model = prepared(how)
    add_fused_lm_head(model, outputs=("log_probs", "entropy", "is_top1"))
    return plain_loop(how, loss_of, model)


@pytest.mark.parametrize(
    ("train", "plain"),
    [
        (by_transformers, plain_loop),
        (by_accelerate, plain_loop),
        (by_lightning, plain_loop),
        (by_trl, plain_loop_as_trl),
    ],
    ids=["transformers", "accelerate", "lightning", "trl"],
)
@pytest.mark.compatibility
def test_each_trains_what_a_plain_loop_trains_and_exports_it(train: Any, plain: Any, tmp_path: Path) -> None:
    model, losses = train(tmp_path / "run", How())
    expected, of_plain = plain(How())
    assert losses == of_plain
    assert len(losses) == 8
    assert_equal_state(model, expected)
    qat.freeze(model)
    qat.export(model, tmp_path / "export")
    assert qat.verify(tmp_path / "export", reference=model, inputs={"input_ids": ROWS[0]["input_ids"][None]})


def test_trl_is_within_rounding_of_the_plain_loss(tmp_path: Path) -> None:
    how = How(INT4, qat.StraightThrough(), qat.QuantizationSchedule())
    assert by_trl(tmp_path, how)[1] == pytest.approx(plain_loop(how)[1], rel=1e-4)


@pytest.mark.parametrize(
    "how",
    [
        How(schedule=qat.QuantizationSchedule(calibration_batches=2, observe_from=1)),
        How(
            INT4_INT8.model_copy(update={"weights": "int2", "activations": None}),
            GPTQ,
            qat.QuantizationSchedule(
                calibration_batches=2, first_weights="int4", first_weights_until=5, hold_scales_from=6, cage=3.0
            ),
        ),
    ],
    ids=["observed activations", "int4 first, held, pulled"],
)
def test_a_resumed_run_equals_an_uninterrupted_one(how: How, tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 3, "train_sampling_strategy": "random"}
    whole, losses, _ = huggingface(tmp_path, how, **saved)
    resumed, later, _ = huggingface(tmp_path, how, resume=tmp_path / "checkpoint-3", **saved)
    assert losses == losses[:3] + later
    assert_equal_state(resumed, whole)
    qat.freeze(resumed)


def test_gradients_are_accumulated_and_steps_are_optimizer_steps(tmp_path: Path) -> None:
    how = How(schedule=qat.QuantizationSchedule(calibration_batches=2, start_step=2))
    accumulated = {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}
    assert huggingface(tmp_path, how, **accumulated)[1] == pytest.approx(huggingface(tmp_path, how)[1], rel=1e-3)


def test_the_best_model_is_exported_as_it_was_judged(tmp_path: Path) -> None:
    how = How(schedule=qat.QuantizationSchedule(calibration_batches=2, observe_from=0))
    best = {"save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2}
    model, _, trainer = huggingface(tmp_path, how, load_best_model_at_end=True, learning_rate=5e-2, **best)
    assert trainer.state.best_metric == min(log["eval_loss"] for log in trainer.state.log_history if "eval_loss" in log)
    assert trainer.state.best_global_step < 8
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    qat.freeze(model)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_the_best_of_adapters_comes_back_or_is_refused(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "save_strategy": "steps", "eval_strategy": "steps", "eval_steps": 2}
    for targets in ("all-linear", ["q_proj"]):
        arguments = TrainingArguments(
            str(tmp_path), **options(max_steps=4, save_steps=2, **best | {"learning_rate": 9.0})
        )
        trainer = Trainer(
            get_peft_model(llama(), LoraConfig(target_modules=targets, task_type="CAUSAL_LM")),
            arguments,
            train_dataset=ROWS,  # type: ignore[arg-type]
            eval_dataset=ROWS[:8],  # type: ignore[arg-type]
            callbacks=[QuantizationCallback(INT4)],
            optimizer_cls_and_kwargs=grouped_optimizer(arguments),
        )
        if targets == ["q_proj"]:
            with pytest.raises(
                qat.TrainingError, match=r"lack the learned ranges of 6 layers without an adapter \(mod"
            ):
                trainer.train()
            continue
        trainer.train()
        assert trainer.state.best_global_step == 2
        assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric


def experts(directory: Path, resume: str | None = None, **own: Any) -> tuple[Any, Trainer]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(vocab_size=64, num_key_value_heads=2, num_local_experts=4, **sizes))
    arguments = TrainingArguments(str(directory), **options(max_steps=4, save_strategy="steps", save_steps=2, **own))
    trainer = Trainer(
        model,
        arguments,
        train_dataset=ROWS,  # type: ignore[arg-type]
        eval_dataset=ROWS[:8],  # type: ignore[arg-type]
        callbacks=[QuantizationCallback(INT4)],
        optimizer_cls_and_kwargs=grouped_optimizer(arguments),
    )
    trainer.train(resume_from_checkpoint=resume)
    return model, trainer


def test_checkpoints_of_experts_resume_and_the_best_comes_back(tmp_path: Path) -> None:
    best = {"load_best_model_at_end": True, "eval_strategy": "steps", "eval_steps": 2, "learning_rate": 1.0}
    model, trainer = experts(tmp_path / "best", **best)
    assert trainer.state.best_global_step == 2
    assert trainer.evaluate()["eval_loss"] == trainer.state.best_metric
    whole, _ = experts(tmp_path / "run")
    resumed, _ = experts(tmp_path / "run", resume=str(tmp_path / "run" / "checkpoint-2"))
    assert_equal_state(resumed, whole)
    for one in (model, resumed):
        qat.freeze(one)


def test_mixed_precision_trains_and_serves_without_autocast(tmp_path: Path) -> None:
    how = How(qat.QuantSpec(weights="int4", dtype="float32"))
    model, losses, _ = huggingface(tmp_path, how, bf16=True, callback={"export": tmp_path / "export", "verify": True})
    assert losses == pytest.approx(huggingface(tmp_path, how)[1], rel=1e-2)
    assert "forward" not in vars(model)
    assert qat.verify(tmp_path / "export", reference=model, inputs={"input_ids": ROWS[0]["input_ids"][None]})


def made(directory: Path, callback: QuantizationCallback, **own: Any) -> Trainer:
    arguments = TrainingArguments(str(directory), **options(**own.pop("arguments", {})))
    return Trainer(own.pop("model", None) or llama(), arguments, train_dataset=ROWS, callbacks=[callback], **own)  # type: ignore[arg-type]


def test_a_trainer_that_decays_ranges_is_refused(tmp_path: Path) -> None:
    trainer = made(tmp_path, QuantizationCallback(INT4))
    with pytest.raises(qat.TrainingError, match=r"learned ranges sit in a group with weight_decay=0.1, .*grouped_opt"):
        trainer.train()
    assert trainer.state.global_step == 0


def test_scales_have_a_rate_of_their_own(tmp_path: Path) -> None:
    trainer = huggingface(tmp_path, How(), max_steps=1)[2]
    groups = {group["name"]: group for group in trainer.optimizer.param_groups}
    assert groups["scales"]["lr"] == groups["weights"]["lr"] / 10
    assert (groups["scales"]["weight_decay"], groups["weights"]["weight_decay"]) == (0.0, 0.1)


def test_what_comes_in_the_wrong_order_is_refused(tmp_path: Path) -> None:
    model = llama()
    early = torch.optim.AdamW(model.parameters())
    with pytest.raises(qat.TrainingError, match=r"optimizers: this optimizer was built before .*grouped_optimizer"):
        made(tmp_path, QuantizationCallback(INT4), model=model, optimizers=(early, None))
    late = made(tmp_path, QuantizationCallback(INT4), arguments={"weight_decay": 0.0})
    late.model = late.model_wrapped = late.callback_handler.model = llama()
    with pytest.raises(qat.TrainingError, match=r"model: was never prepared: give the callback to the Trainer's con"):
        late.train()
    frozen = prepared(How(INT4))
    qat.freeze(frozen)
    with pytest.raises(qat.StateError, match="model: is frozen and cannot be trained further"):
        made(tmp_path, QuantizationCallback(INT4), model=frozen)


def test_what_would_spoil_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(qat.TrainingError, match="bf16_full_eval: True would round the float masters"):
        made(tmp_path, QuantizationCallback(INT4), arguments={"bf16_full_eval": True})
    with pytest.raises(qat.TrainingError, match="verify: True needs what was exported, got export=None"):
        QuantizationCallback(INT4, verify=True)
    model = llama()
    before = model.lm_head.weight.detach().clone()
    model.lm_head.register_forward_hook(lambda *arguments: arguments[-1] * float("inf"))
    trainer = made(tmp_path, QuantizationCallback(INT4), model=model, arguments={"weight_decay": 0.0})
    with pytest.raises(
        qat.TrainingError, match=r"gradient: is not finite at step 0; .*; the weights and the last checkp"
    ):
        trainer.train()
    assert torch.equal(model.lm_head.weight, before)


def test_guards_skip_a_step_and_log_what_looks_find(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    guards = qat.NumericalGuards(nonfinite="skip", every=2, log=True)
    trainer = made(tmp_path, QuantizationCallback(INT4, guards=guards), arguments={"weight_decay": 0.0, "max_steps": 3})
    model: Any = trainer.model
    head, step, seen = model.lm_head, [0], []
    model.register_forward_pre_hook(lambda *_: seen.append(head.weight.detach().clone()))

    def spoil(gradient: torch.Tensor) -> torch.Tensor:
        step[0] += 1
        return gradient * torch.inf if step[0] == 2 else gradient

    head.weight.register_hook(spoil)
    trainer.train()
    assert "gradient: is not finite at step 1; inf or NaN is in the gradients of " in caplog.text
    assert "; the step is skipped, 1 in all" in caplog.text
    first, second, third = seen[-3:]  # calibration comes before
    assert not torch.equal(first, second)
    assert torch.equal(second, third)
    (logged,) = [line for line in trainer.state.log_history if any(key.startswith("quantization/") for key in line)]
    assert logged["step"] == 2
    assert logged["quantization/model.layers.0.self_attn.q_proj/int4/saturated"] < 0.1


def test_an_optimizer_with_groups_of_its_own_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = staticmethod(lambda arguments, model: (lambda: None, {"lr": 1.0}))
    monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", own)
    with pytest.raises(qat.TrainingError, match=r"optim: .* makes groups of its own"):
        huggingface(tmp_path, How(INT4, None))


def test_a_quantized_head_that_trl_does_not_call_is_refused(tmp_path: Path) -> None:
    spec = qat.QuantSpec(weights="int4", dtype="float32", overrides={"lm_head": "int8"})
    with pytest.raises(qat.StateError, match=r"used without calling their layer, in float \(lm_head\): exclude"):
        by_trl(tmp_path, How(spec, qat.StraightThrough(), qat.QuantizationSchedule()))
