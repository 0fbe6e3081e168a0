"""`Distiller`: what is compared with the teacher, in plain loops, under checkpointing and with every kind of fault."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import BertConfig, BertForSequenceClassification, LlamaConfig, LlamaForCausalLM

import qat
from qat.errors import SpecError, TrainingError
from qat.training.losses import attention_distance, divergence, hidden_state_distance, squared_distance

IDS = torch.arange(12).reshape(2, 6)
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
INPUTS = {"input_ids": IDS, "attention_mask": MASK}


def llama(vocabulary: int = 16, layers: int = 2, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, num_hidden_layers=layers, **sizes))


def bert(seed: int = 0, attention: str = "eager", dropout: float = 0.0) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "vocab_size": 16}
    sizes |= {"num_hidden_layers": 2, "attention_probs_dropout_prob": dropout, "hidden_dropout_prob": 0.0}
    return BertForSequenceClassification(BertConfig(**sizes, attn_implementation=attention))


def hooks_of_ours(model: nn.Module) -> list[Any]:
    """Forward hooks that a distillation left behind; transformers and prepared models have others."""
    hooks = [hook for module in model.modules() for hook in module._forward_hooks.values()]
    return [hook for hook in hooks if getattr(hook, "__module__", "").startswith("qat.training")]


def close(left: Tensor, right: Tensor) -> bool:
    return torch.allclose(left, right, rtol=1e-5, atol=0)


class Stack(nn.Module):
    """Blocks that return a tuple, with checkpointing of either form."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Pair() for _ in range(2))
        self.reentrant, self.calls = reentrant, 0

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            self.calls += 1
            x, _ = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return x


class Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.ran = 0

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        self.ran += 1
        return self.linear(x).sin(), None


def test_the_default_is_the_divergence_of_logits_without_padding() -> None:
    student, teacher = llama(seed=1), llama()
    outputs, distance = qat.Distiller(student, teacher)(INPUTS)
    expected = divergence(outputs.logits, teacher(**INPUTS).logits, MASK.bool())
    assert torch.equal(distance, expected)
    assert float(distance.detach()) > 0
    distance.backward()
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    assert not teacher.training


@pytest.mark.parametrize(("loss", "share"), [("reverse_kl", 1.0), ("mixed_kl", 0.3)])
def test_the_loss_is_named(loss: Any, share: float) -> None:
    student, teacher = llama(seed=1), llama()
    how = qat.Distillation(loss=loss, gamma=0.3, temperature=2.0)
    outputs, distance = qat.Distiller(student, teacher, how)(INPUTS)
    expected = divergence(outputs.logits, teacher(**INPUTS).logits, MASK.bool(), reverse=share, temperature=2.0)
    assert torch.equal(distance, expected)


def test_rows_that_count_are_named_and_padding_never_does() -> None:
    student, teacher, wanted = llama(seed=1), llama(), torch.rand(2, 6) < 0.7
    outputs, distance = qat.Distiller(student, teacher)(INPUTS, lambda outputs: (outputs.logits, wanted))
    assert torch.equal(distance, divergence(outputs.logits, teacher(**INPUTS).logits, wanted & MASK.bool()))


def test_other_predictions_are_compared_by_their_squared_distance() -> None:
    student, teacher, x = Stack(), Stack(), torch.randn(3, 4)
    distiller = qat.Distiller(student, teacher, qat.Distillation(loss="squared"))
    outputs, distance = distiller({"x": x}, lambda outputs: (outputs, None))
    assert torch.equal(distance, squared_distance(outputs, teacher(x)))


def test_hidden_states_are_those_of_each_block() -> None:
    student, teacher = llama(seed=1), llama()
    how = qat.Distillation(hidden_states=2.0)
    outputs, distance = qat.Distiller(student, teacher, how)(INPUTS)
    states: list[list[Tensor]] = []
    for model in (student, teacher):
        states.append([])
        for layer in model.model.layers:  # by a hook of the test's own: transformers normalizes the last of its own
            layer.register_forward_hook(lambda _, __, out, kept=states[-1]: kept.append(out))
        model(**INPUTS)
    relative = hidden_state_distance(states[0], states[1], MASK.bool())
    assert close(distance, divergence(outputs.logits, teacher(**INPUTS).logits, MASK.bool()) + 2 * relative)


@pytest.mark.parametrize("library", [True, False], ids=["transformers", "plain"])
def test_checkpointing_counts_no_block_twice(library: bool) -> None:
    how = qat.Distillation(hidden_states=1.0)
    found = []
    for recomputed in (False, True):
        if library:
            student, teacher, inputs = llama(seed=1), llama(), INPUTS
            if recomputed:
                student.activation_checkpointing_enable({"use_reentrant": False})
        else:
            torch.manual_seed(1)
            student, teacher = Stack(False if recomputed else None), Stack()
            inputs = {"x": torch.ones(3, 4)}
        distiller = qat.Distiller(student.train(), teacher, how)
        losses = []
        for _ in range(2):
            _, distance = distiller(inputs)
            distance.backward()
            losses.append(distance.detach())
        assert torch.equal(*losses)
        found.append((losses[0], [parameter.grad for parameter in student.parameters()]))
        if not library:
            assert [block.ran for block in student.blocks] == [4 if recomputed else 2] * 2
        assert not hooks_of_ours(student) + hooks_of_ours(teacher)
    assert torch.equal(found[0][0], found[1][0])
    assert all(close(left, right) for left, right in zip(found[0][1], found[1][1], strict=True))


def test_reentrant_checkpointing_is_refused_where_it_would_hide_gradients() -> None:
    x = torch.ones(3, 4, requires_grad=True)
    distiller = qat.Distiller(Stack(True), Stack(), qat.Distillation(hidden_states=1.0))
    with pytest.raises(TrainingError, match="use_reentrant=False"):
        distiller({"x": x})
    with torch.no_grad():  # an evaluation hides none
        qat.Distiller(Stack(), Stack(), qat.Distillation(hidden_states=1.0))({"x": x})


def test_attention_maps_are_compared_without_padding() -> None:
    student, teacher = bert(1), bert()
    outputs, distance = qat.Distiller(student.train(), teacher, qat.Distillation(attention_maps=3.0))(INPUTS)
    taught = teacher(**INPUTS, output_attentions=True)
    maps = attention_distance(outputs.attentions, taught.attentions, MASK.bool())
    assert float(maps.detach()) > 0
    assert close(distance, divergence(outputs.logits, taught.logits) + 3 * maps)


def test_a_prepared_student_is_distilled_in_a_plain_loop() -> None:
    teacher = llama()
    student = copy.deepcopy(teacher)
    qat.prepare(student, qat.QuantSpec(weights="int2", dtype="float32"), algorithm=qat.LearnedAffine())
    distiller = qat.Distiller(student, teacher, qat.Distillation(hidden_states=1.0))
    optimizer = torch.optim.AdamW(qat.parameter_groups(student, lr=1e-3))
    losses = []
    for _ in range(30):
        _, distance = distiller(INPUTS)
        optimizer.zero_grad()
        distance.backward()
        optimizer.step()
        losses.append(float(distance.detach()))
    assert losses[-1] < losses[0] * 0.7
    assert not hooks_of_ours(student)  # freezing would ask what they do


@pytest.mark.parametrize("compiled", ["wrapped", "in place"])
def test_a_compiled_student_is_distilled_by_its_outputs(compiled: str) -> None:
    student, teacher, x = Stack(), Stack(), torch.ones(3, 4)
    expected = qat.Distiller(student, teacher)({"x": x})[1]
    whole: Any = student
    if compiled == "wrapped":
        whole = torch.compile(student, backend="eager")
    else:
        student.compile(backend="eager")
    assert close(qat.Distiller(whole, teacher)({"x": x})[1], expected)
    with pytest.raises(TrainingError, match="hidden_states: cannot be read from a compiled model"):
        qat.Distiller(whole, teacher, qat.Distillation(hidden_states=1.0))


@pytest.mark.parametrize(
    ("student", "teacher", "how", "message"),
    [
        (llama, lambda: llama(20), {}, r"student's shape \(2, 6, 16\), got \(2, 6, 20\): give a teacher with"),
        (llama, lambda: llama(layers=3), {"hidden_states": 1.0}, "must have the student's 2 blocks, got 3"),
        (bert, lambda: bert(attention="sdpa"), {"attention_maps": 1.0}, "the teacher gave no attention probabilities"),
        (lambda: bert(attention="sdpa"), bert, {"attention_maps": 1.0}, "the student gave no attention probabilities"),
        (lambda: bert(dropout=0.5), bert, {"attention_maps": 1.0}, "do not sum to 1: switch off the dropout"),
        (llama, lambda: "path", {}, "teacher: must be a model or qat.CachedLogits, got str"),
    ],
    ids=["vocabulary", "blocks", "teacher without maps", "student without maps", "dropout", "a path"],
)
def test_a_teacher_that_does_not_fit_is_refused(
    student: Any, teacher: Any, how: dict[str, float], message: str
) -> None:
    with pytest.raises(TrainingError, match=message):
        qat.Distiller(student().train(), teacher(), qat.Distillation(**how))(INPUTS)


def test_the_student_is_no_teacher() -> None:
    student = llama()
    with pytest.raises(TrainingError, match=r"teacher: shares parameters with the student: give a copy"):
        qat.Distiller(student, student)
    assert all(parameter.requires_grad for parameter in student.parameters())


def test_hidden_states_need_blocks_that_return_tensors() -> None:
    flat = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(SpecError, match="has no list of blocks"):
        qat.Distiller(flat, copy.deepcopy(flat), qat.Distillation(hidden_states=1.0))
    student, teacher = Stack(), Stack()
    for block in student.blocks:
        block.register_forward_hook(lambda *_: SimpleNamespace())
    with pytest.raises(TrainingError, match="hidden_states: a block must return a tensor"):
        qat.Distiller(student, teacher, qat.Distillation(hidden_states=1.0))({"x": torch.ones(3, 4)})


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ({"weight": 1.5}, "weight: Input should be less than or equal to 1, got 1.5"),
        ({"temperature": 0.0}, "temperature: Input should be greater than 0"),
        ({"gamma": -0.1}, "gamma: "),
        ({"hidden_states": -1}, "hidden_states: "),
        ({"loss": "js"}, "loss: "),
        ({"loss": "squared", "temperature": 2.0}, "temperature: must be 1 with loss='squared'"),
        ({"distance": 1}, "distance: .*choose from loss, weight"),
    ],
    ids=str,
)
def test_impossible_values_are_refused(field: dict[str, Any], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        qat.Distillation(**field)


def test_a_copy_has_the_same_teacher() -> None:
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    distiller = qat.Distiller(student, teacher)
    again = copy.deepcopy(distiller)
    assert again.teacher is teacher
    assert again.student is not student


def test_inputs_without_names_are_refused() -> None:
    with pytest.raises(TrainingError, match=r"inputs: must be keyword arguments of both models, got one Tensor"):
        qat.Distiller(nn.Linear(4, 3), nn.Linear(4, 3))(torch.ones(2, 4))  # type: ignore[arg-type]
