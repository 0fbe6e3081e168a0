"""Several processes: every rank trains, calibrates and freezes to the same numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

import qat
from tests.training_modules import (
    INT8,
    INT8_INT8,
    LearnedStep,
    UserModule,
    layers_of,
    loader,
    quantization,
    quiet_trainer,
)

ROOT = Path(__file__).parent.parent

SCRIPT = """
import json, sys
from pathlib import Path
import torch
from lightning.pytorch.strategies import DDPStrategy
from qat import Absmax, LearnedAffine, freeze
from pydantic import TypeAdapter
from qat.files.evidence import FrozenRecord, frozen_record
from tests.training_modules import *

class Lopsided(UserModule):
    lasting = True

    def on_before_batch_transfer(self, batch, dataloader_idx):
        # The large activations are all on rank 1, and while it observes, only in its first batches.
        large = self.trainer.global_rank == 1 and (self.lasting or self.global_step < 2)
        return [batch[0] * (10 if large else 1), batch[1]]

directory = Path(sys.argv[1])
torch.set_num_threads(1)
runs = {
    "calibrated": {},
    "observed": {"calibration_batches": 0, "observe_from": 0, "observe_until": 5},
    "learned": {"algorithm": LearnedStep()},
    "started": {
        "spec": QuantSpec(weights="int2", activations="int8", dtype="float32"),
        "algorithm": LearnedAffine(start="gptq"),  # of masters too
        "first_weights": "int4",
        "first_weights_until": 2,
    },
}
for name, run in runs.items():
    module = Lopsided()
    module.lasting = name != "observed"
    callback = quantization(**{"spec": INT8_INT8, **run}, observer=Absmax())
    strategy = DDPStrategy(process_group_backend="gloo")
    trainer = quiet_trainer(directory, callback, strategy=strategy, devices=2)
    trainer.fit(module, loader(16))
    freeze(module.model)
    record = TypeAdapter(FrozenRecord).dump_python(frozen_record(module.model), mode="json")
    (directory / f"{name}-{trainer.global_rank}.json").write_text(json.dumps(record))
"""


@pytest.mark.slow
def test_both_ranks_freeze_to_equal_digests(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("calibrated", "observed", "learned", "started"):
        first, second = (json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1))
        assert first == second, name
        assert first["layers"]["first"]["input_scale"] > 15 / 127, name  # rank 1's range; rank 0's stays below 5


def test_statistics_are_left_alone_when_buffers_are_broadcast(tmp_path: Path) -> None:
    module = UserModule()
    module._ddp_params_and_buffers_to_ignore = ["mine"]
    for _ in range(2):
        quiet_trainer(tmp_path, quantization(INT8_INT8), max_steps=1).fit(module, loader())
    ignored = module._ddp_params_and_buffers_to_ignore
    assert "model.first.input_quantizer.observer.counts" in ignored
    assert [name for name in ignored if "put_quantizer." not in name] == ["mine"]


def test_worker_processes_that_would_lose_the_quantizers_are_refused(tmp_path: Path) -> None:
    """Lightning brings back only the state, which a float module in this process cannot take."""
    options = {"strategy": "ddp_fork", "devices": 1}
    with pytest.raises(Exception, match=r"before the fit, or use strategy='ddp'"):
        quiet_trainer(tmp_path, quantization(INT8, LearnedStep()), **options).fit(UserModule(), loader())
    prepared = UserModule()
    qat.prepare(prepared.model, INT8, algorithm=LearnedStep())
    before = layers_of(prepared)[0].weight_quantizer.scale.detach().clone()
    quiet_trainer(tmp_path, quantization(INT8, LearnedStep()), **options).fit(prepared, loader())
    assert not before.equal(layers_of(prepared)[0].weight_quantizer.scale)


def test_a_late_start_that_ddp_would_not_bear_is_refused(tmp_path: Path) -> None:
    """Until it, learned ranges get no gradient, for which DistributedDataParallel waits."""
    strategy = DDPStrategy(process_group_backend="gloo", start_method="popen")
    module = UserModule()
    callback = quantization(INT8, qat.LearnedAffine(), start_step=3)
    try:
        with pytest.raises(qat.TrainingError, match=r"start_step=3 .*: use strategy='ddp_find_unused_parameters_true'"):
            quiet_trainer(tmp_path, callback, strategy=strategy).fit(module, loader())
    finally:
        torch.distributed.destroy_process_group()
    assert module.losses == []


def test_a_late_start_of_codes_alone_is_refused(tmp_path: Path) -> None:
    module = UserModule()
    qat.prepare(module.model, INT8, algorithm=qat.LearnedAffine())
    qat.fix_codes(module.model)
    callback = quantization(INT8, qat.LearnedAffine(), start_step=3)
    with pytest.raises(qat.TrainingError, match="start_step=3 begins in float, but the model has codes only"):
        quiet_trainer(tmp_path, callback).fit(module, loader())
