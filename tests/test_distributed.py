"""Two processes train, calibrate, freeze and export, from whole weights and from shards (`distributed_worker`)."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qat
from qat.distributed import refuse_sharded
from tests.distributed_worker import CASES, MORE

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
SAME = {"qat_manifest.json", "README.md"}  # where notes are


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("distributed")
    torchrun = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "-m", "tests.distributed_worker", str(directory)]
    options: Any = {"capture_output": True, "text": True, "timeout": 300, "check": False}
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, **options)
    assert done.returncode == 0, done.stderr[-6000:]
    return directory


@pytest.fixture(scope="module")
def found(ran: Path) -> list[dict[str, Any]]:
    return [json.loads((ran / f"{rank}.json").read_text()) for rank in (0, 1)]


def files(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_one_device(name: str, engine: str, found: list[dict[str, Any]]) -> None:
    wanted = found[0]["references"][name]
    tolerance = 1e-4 if "learned" in name else 1e-6  # a start from data moves weights, and roundings move codes
    assert found[0][f"{name}/{engine}"] == pytest.approx(wanted, rel=tolerance)


@pytest.mark.parametrize("name", [*(f"{name}/fsdp2" for name in CASES | MORE), "straight-int4/within-groups"])
def test_an_export_from_shards_is_that_of_one_process(name: str, ran: Path) -> None:
    assert files(ran / name) == files(ran / f"{name}-single")
    qat.verify(ran / name)


def test_one_layer_is_whole_at_a_time(found: list[dict[str, Any]]) -> None:
    experts = {"experts/fsdp2": 2}  # both parameters of a module of experts
    assert found[0]["most"] == {name: experts.get(name, 1) for name in found[0]["most"]}
    assert len(found[0]["most"]) == len(CASES) + len(MORE) + 2


def test_a_shard_may_end_within_a_group(found: list[dict[str, Any]]) -> None:
    """Rows are cut in two, groups of 128 too; operators see gathered weights."""
    assert found[0]["straight-int4/within-groups"] == pytest.approx(found[0]["straight-int4/fsdp2"], rel=1e-6)


def test_codes_are_those_of_the_copies_that_a_policy_makes(ran: Path) -> None:
    export, cast, masters = (files(ran / "learned-int4" / name) for name in ("policy", "policy-single", "masters"))
    assert {name for name in export if export[name] != cast[name]} == SAME
    assert export["model.safetensors"] != masters["model.safetensors"]
    assert "codes are of the bfloat16 copies of masters" in export["qat_manifest.json"].decode()


@pytest.mark.parametrize("checkpoint", ["parts", "file"])
def test_lightning_shards_and_resumes(checkpoint: str, ran: Path, found: list[dict[str, Any]]) -> None:
    for rank in found:
        runs = rank["lightning"]
        assert runs[f"{checkpoint}/whole"] == pytest.approx(runs["ddp"], rel=1e-4)
        assert runs[f"{checkpoint}/resumed"] == runs[f"{checkpoint}/whole"][2:]
    whole, resumed = (files(ran / "lightning" / f"{checkpoint}-{kind}") for kind in ("whole", "resumed"))
    assert whole == resumed


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_all_ranks_skip_a_step_that_one_of_them_spoils(engine: str, found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert len(rank["skipped"][engine]) == 4
        assert len(set(rank["skipped"][engine])) == 1  # of all weights


REFUSED = {
    "tensor parallel": r"StateError: QLinear: its weight is sharded while it runs .* tensor parallel is not supported",
    "cast ranges": r"StateError: model: the mixed-precision policy of fully_shard casts the learned ranges of 14",
    "a mesh": r"StateError: mesh: its dimension 'tensor_parallel' has more than one rank",
    "again": r"StateError: model: is sharded already",
    "fix_codes": r"StateError: model: its weights are sharded: call qat\.fix_codes before qat\.shard",
    "prepare": r"StateError: model: its weights are sharded: call qat\.prepare .* before qat\.shard",
    "a part": r"StateError: model: is a part of what is sharded",
    "a layer": r"StateError: QLinear: its weight is sharded while it runs",
    "loss": r"TrainingError: loss: became (nan|inf or NaN) at step 0 on some rank; .*; the weights and",
    "counts": r"CalibrationError: batches: ranks bring \[1, 2\]",
    "batches": r"CalibrationError: rank 1: division by zero",
    "inf": r"CalibrationError: rank 1: batches: batch 1 gives inf or NaN",
    "outputs": r"StateError: model: its weights are sharded: call qat\.calibrate of a model that quantizes outputs",
    "freeze": r"QatError: rank 1: division by zero",
    "reads": r"StateError: rank 0: model: the weights of 1 prepared layers are used without calling their layer",
    "export": r"ExportError: (rank 0: )?directory: .* is a file or a link",
}


@pytest.mark.parametrize("what", REFUSED)
def test_all_ranks_are_told(what: str, found: list[dict[str, Any]]) -> None:
    for rank in found:
        assert re.match(REFUSED[what], rank["refused"][what])


def test_rank_0_may_export_alone(ran: Path) -> None:
    qat.verify(ran / "alone")


def test_without_a_process_group_nothing_is_sharded() -> None:
    model = nn.Sequential(nn.Linear(8, 8))
    with pytest.raises(qat.StateError, match=r"mesh: there is no process group: start the script by torchrun"):
        qat.shard(model)
    refuse_sharded(model, "nothing")
    assert type(next(model.parameters()).data) is torch.Tensor


def test_a_frozen_model_is_not_sharded() -> None:
    model = nn.Sequential(nn.Linear(16, 16))
    qat.prepare(model, qat.QuantSpec(weights="int8"))
    qat.freeze(model)
    with pytest.raises(qat.StateError, match=r"model: is frozen: pass a prepared or float model"):
        qat.shard(model)
