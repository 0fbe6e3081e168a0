"""Teachers that take little memory: one block at a time, and logits on disk, with what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qat
from qat.errors import ExportError, LoadError, SpecError, TrainingError
from qat.training import teacher
from qat.training.losses import divergence
from qat.training.teacher import INDEX, logits_of, one_block_at_a_time
from tests.test_training_losses import peak

VOCABULARY = 11


class Tokens(nn.Module):
    """Logits for each token that depend on it and on its place, or one row of logits for all."""

    def __init__(self, vocabulary: int = VOCABULARY, pooled: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(VOCABULARY, vocabulary)
        self.pooled = pooled
        self.dropout = nn.Dropout(0.5)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
        logits = self.dropout(self.table(input_ids))
        return SimpleNamespace(logits=logits.mean(1) if self.pooled else logits.cumsum(1))


def batch(rows: int = 4, length: int = 6) -> dict[str, Tensor]:
    return {"input_ids": torch.randint(0, VOCABULARY, (rows, length))}


def padded(ids: Tensor, kept: list[int], left: bool) -> dict[str, Tensor]:
    """Rows cut to ``kept`` tokens and padded to the same length again."""
    places = torch.arange(ids.shape[1])
    count = torch.tensor(kept)[:, None]
    mask = places >= ids.shape[1] - count if left else places < count
    padded_ids = torch.zeros_like(ids)
    for row, number in enumerate(kept):
        padded_ids[row][mask[row]] = ids[row, :number]
    return {"input_ids": padded_ids, "attention_mask": mask.long()}


@pytest.mark.parametrize("k", [3, VOCABULARY, 64])
def test_cached_logits_teach_what_the_model_does(k: int, tmp_path: Path) -> None:
    student, teacher, data = Tokens().eval(), Tokens(), [batch(), batch()]
    cached = qat.cache_logits(teacher, data, tmp_path / "cache", top_k=k)
    assert teacher.training
    assert isinstance(cached, qat.CachedLogits)
    again = qat.CachedLogits(tmp_path / "cache")
    for inputs in data:
        _, full = qat.Distiller(student, teacher)(inputs)
        _, found = qat.Distiller(student, again)(inputs)
        if k >= VOCABULARY - 1:
            torch.testing.assert_close(found, full)
        else:
            taught = teacher(**inputs).logits
            top = taught.topk(k).indices
            rest = taught.scatter(-1, top, -torch.inf).exp().sum(-1, keepdim=True).log()
            given = torch.cat([taught.gather(-1, top), rest], -1)
            torch.testing.assert_close(found, divergence(student(**inputs).logits, given, indices=top))
            assert float(found.detach()) < float(full.detach())
        found.backward()


def test_rows_may_be_shuffled_and_padded_in_another_way(tmp_path: Path) -> None:
    ids, kept, teacher = batch()["input_ids"], [6, 2, 4, 3], Tokens().eval()
    cached = qat.cache_logits(teacher, [padded(ids, kept, left=False)], tmp_path / "cache", top_k=4)
    wanted = cached(padded(ids, kept, left=False))
    order = torch.tensor([2, 0, 3, 1])
    found = cached(padded(ids[order], [kept[row] for row in order], left=True))
    for row, source in enumerate(order.tolist()):
        number = kept[source]
        for part, whole in zip(found, wanted, strict=True):
            assert torch.equal(part[row, 6 - number :], whole[source, :number])
            assert not part[row, : 6 - number].any()


def test_one_row_of_logits_for_each_text_is_cached_too(tmp_path: Path) -> None:
    student, teacher = Tokens(pooled=True).eval(), Tokens(pooled=True)
    inputs = padded(batch()["input_ids"], [6, 1, 4, 3], left=False)
    cached = qat.cache_logits(teacher, [inputs], tmp_path / "cache")
    _, full = qat.Distiller(student, teacher)(inputs)
    _, found = qat.Distiller(student, cached)(inputs)
    torch.testing.assert_close(found, full)


def test_narrow_logits_are_cached_as_they_are(tmp_path: Path) -> None:
    teacher, inputs = Tokens().bfloat16().eval(), batch()
    values, indices = qat.cache_logits(teacher, [inputs], tmp_path / "cache", top_k=4)(inputs)
    top = teacher(**inputs).logits.topk(4)
    assert torch.equal(values[..., :4], top.values.float())
    assert torch.equal(indices, top.indices)


@pytest.mark.parametrize("pooled", [False, True])
def test_a_cache_written_by_chunks_is_the_same(pooled: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs = Tokens(pooled=pooled), padded(batch()["input_ids"], [6, 0, 4, 3], left=False)
    whole = qat.cache_logits(model, [inputs], tmp_path / "whole", top_k=4)(inputs)
    monkeypatch.setattr(teacher, "CHUNK", 5 * VOCABULARY)
    chunked = qat.cache_logits(model, [inputs], tmp_path / "chunked", top_k=4)(inputs)
    assert all(torch.equal(found, wanted) for found, wanted in zip(chunked, whole, strict=True))


def test_a_cache_is_written_without_a_float32_copy_of_all_logits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Fixed(nn.Module):
        logits = torch.randn(8, 64, 512).bfloat16()

        def forward(self, input_ids: Tensor) -> Tensor:
            return self.logits

    chunk, inputs = 2**12, {"input_ids": torch.randint(0, VOCABULARY, (8, 64))}
    monkeypatch.setattr(teacher, "CHUNK", chunk)
    written = 8 * 64 * 4 * (2 + 4 + 4)  # twice, in parts and whole
    taken = peak(lambda: qat.cache_logits(Fixed(), [inputs], tmp_path / "cache", top_k=4))
    assert taken <= 2 * written + 5 * 4 * chunk < Fixed.logits.numel()


@pytest.fixture
def cache(tmp_path: Path) -> tuple[Path, dict[str, Tensor]]:
    inputs = batch()
    qat.cache_logits(Tokens(), [inputs, batch()], tmp_path / "cache", top_k=4)
    return tmp_path / "cache", inputs


def test_logits_of_other_data_are_refused(cache: tuple[Path, dict[str, Tensor]]) -> None:
    folder, inputs = cache
    distiller = qat.Distiller(Tokens(), qat.CachedLogits(folder))
    with pytest.raises(TrainingError, match=r"cache' was made of other data: it lacks 4 of 4 rows of input_ids"):
        distiller(batch(4, 5))
    mixed = {"input_ids": torch.cat([inputs["input_ids"], batch(1)["input_ids"]])}
    with pytest.raises(TrainingError, match=r"cache' is incomplete: it lacks 1 of 5 rows of input_ids, such as row 4"):
        distiller(mixed)
    with pytest.raises(TrainingError, match=r"cached by input_ids, .* got the batch {'x': \(1,\)}: pass"):
        distiller.teacher({"x": torch.zeros(1)})  # type: ignore[arg-type]


@pytest.mark.parametrize("fault", ["missing", "cut"])
def test_a_lost_entry_is_an_error(fault: str, cache: tuple[Path, dict[str, Tensor]]) -> None:
    folder, inputs = cache
    file = folder / "logits-000000.safetensors"
    if fault == "missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(LoadError, match=r"has lost entries, logits-000000\.safetensors cannot be read.*write it again"):
        qat.CachedLogits(folder)(inputs)


@pytest.mark.parametrize("text", [None, "no json", "{}", "[]"], ids=str)
def test_a_directory_without_an_index_holds_no_logits(text: str | None, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / INDEX).write_text(text)
    with pytest.raises(LoadError, match=r"holds no cached logits .*write them with qat.cache_logits"):
        qat.CachedLogits(tmp_path)


def test_logits_of_another_vocabulary_are_refused(cache: tuple[Path, dict[str, Tensor]]) -> None:
    folder, inputs = cache
    with pytest.raises(TrainingError, match=r"cached logits are of 11 classes, but the student has 13: cache"):
        qat.Distiller(Tokens(13), qat.CachedLogits(folder))(inputs)


@pytest.mark.parametrize(
    "how", [{"temperature": 2.0}, {"hidden_states": 1.0}, {"attention_maps": 1.0}, {"loss": "squared"}], ids=str
)
def test_a_cache_gives_logits_at_temperature_one_alone(
    how: dict[str, Any], cache: tuple[Path, dict[str, Tensor]]
) -> None:
    with pytest.raises(TrainingError, match=r"cached logits serve the KL losses at temperature 1 alone"):
        qat.Distiller(Tokens(), qat.CachedLogits(cache[0]), qat.Distillation(**how))


def test_nothing_is_left_of_a_cache_that_fails(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="top_k: must be at least 1, got 0"):
        qat.cache_logits(Tokens(), [batch()], tmp_path / "cache", top_k=0)
    with pytest.raises(TrainingError, match="batches: there is none"):
        qat.cache_logits(Tokens(), [], tmp_path / "cache")
    with pytest.raises(TrainingError, match="cached by input_ids"):
        qat.cache_logits(Tokens(), [batch(), {"x": torch.zeros(1)}], tmp_path / "cache")
    for wrong in (batch(), [{"input_ids": torch.zeros(3).long()}]):  # one batch, and one without rows
        with pytest.raises(TrainingError, match="cached by input_ids"):
            qat.cache_logits(Tokens(), wrong, tmp_path / "cache")  # type: ignore[arg-type]
    spoilt = Tokens()
    next(spoilt.parameters()).data.fill_(torch.nan)
    with pytest.raises(TrainingError, match="the teacher gives NaN for batch 0"):
        qat.cache_logits(spoilt, [batch()], tmp_path / "cache")
    assert not list(tmp_path.iterdir())
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ExportError, match="is not empty"):
        qat.cache_logits(Tokens(), [batch()], tmp_path / "full")


def test_the_index_names_rows_by_digests(cache: tuple[Path, dict[str, Tensor]]) -> None:
    index = json.loads((cache[0] / INDEX).read_text())
    assert index["classes"] == VOCABULARY
    assert len(index["rows"]) == 8
    assert all(len(key) == 64 and end - start == 6 for key, (_, start, end) in index["rows"].items())


def test_outputs_without_logits_are_an_error() -> None:
    with pytest.raises(TrainingError, match=r"got SimpleNamespace: say which tensor of it is compared \(predictions="):
        logits_of(SimpleNamespace(logits=None))


class Blocks(nn.Module):
    """Notes which blocks hold tensors that are not at home, whenever one runs."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(3))
        self.away: list[list[int]] = []
        self.homes = [[tensor.data_ptr() for tensor in block.state_dict().values()] for block in self.blocks]

    def places(self) -> list[int]:
        now = [[tensor.data_ptr() for tensor in block.state_dict().values()] for block in self.blocks]
        return [number for number, (home, place) in enumerate(zip(self.homes, now, strict=True)) if home != place]

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            block[0].register_forward_hook(lambda *_: self.away.append(self.places()))
            x = block(x)
        return x


def test_one_block_is_on_the_device_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = Blocks().eval(), torch.randn(2, 4)
    expected = model(x)
    assert model.away == [[], [], []]
    model.away.clear()
    monkeypatch.setattr(Tensor, "to", lambda self, *_: self.clone())  # as from the CPU to a GPU
    with one_block_at_a_time(model, torch.device("cpu")):
        assert model.places() == []
        found = model(x)
    assert torch.equal(found, expected)
    assert {tuple(away) for away in model.away} == {(0,), (1,), (2,)}
    assert model.places() == []
    assert not any(block._forward_pre_hooks or block._forward_hooks for block in model.blocks)


def test_a_block_that_fails_goes_home_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Blocks().eval()
    model.blocks[1][0].register_forward_pre_hook(lambda *_: 1 / 0)
    monkeypatch.setattr(Tensor, "to", lambda self, *_: self.clone())
    with pytest.raises(ZeroDivisionError), one_block_at_a_time(model, torch.device("cpu")):
        model(torch.randn(2, 4))
    assert model.places() == []


def test_offloading_changes_no_number() -> None:
    student, teacher, x = Blocks().eval(), Blocks().eval(), torch.randn(2, 4)
    found = [
        qat.Distiller(student, teacher, qat.Distillation(hidden_states=1.0, offload=offload))({"x": x})[1].detach()
        for offload in (False, True)
    ]
    assert torch.equal(*found)
    flat = nn.Linear(4, 3)
    with pytest.raises(SpecError, match="has no list of blocks"):
        qat.Distiller(nn.Linear(4, 3), flat, qat.Distillation(offload=True))({"input": x})


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_blocks_stay_in_cpu_memory_while_the_rest_is_on_the_gpu() -> None:
    device = torch.device("cuda")
    model, x = Blocks().eval(), torch.randn(2, 4)
    expected = model(x)
    with one_block_at_a_time(model, device), torch.no_grad():
        found = model(x.to(device))
    torch.testing.assert_close(found.cpu(), expected)
    assert model.first.weight.is_cuda
    assert not any(parameter.is_cuda for parameter in model.blocks.parameters())
