from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import qat
from qat.training.restoring import restore
from tests.training_modules import INT4, INT8_INT8, UserModule, assert_equal_state, loader, quantization, quiet_trainer

pytestmark = pytest.mark.compatibility


def saved(directory: Path, spec: Any, algorithm: Any) -> tuple[UserModule, Path]:
    module = UserModule()
    trainer = quiet_trainer(directory, quantization(spec, algorithm), max_steps=2)
    trainer.fit(module, loader())
    trainer.save_checkpoint(directory / "saved.ckpt")
    return module, directory / "saved.ckpt"


@pytest.mark.parametrize(
    ("spec", "algorithm"), [(INT4, qat.LearnedAffine()), (INT8_INT8, qat.StraightThrough())], ids=["int4", "int8_int8"]
)
def test_a_checkpoint_becomes_the_export_of_the_trained_model(tmp_path: Path, spec: Any, algorithm: Any) -> None:
    module, path = saved(tmp_path, spec, algorithm)
    model = restore(UserModule().model, path)
    assert_equal_state(model, module.model)
    for name, one in (("trained", module.model), ("restored", model)):
        qat.freeze(one)
        qat.export(one, tmp_path / name)
    files = [{p.name: p.read_bytes() for p in (tmp_path / name).iterdir()} for name in ("trained", "restored")]
    assert files[0] == files[1]


def test_what_is_no_such_checkpoint_is_told(tmp_path: Path) -> None:
    module, path = saved(tmp_path, INT4, qat.LearnedAffine())
    other = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(qat.LoadError, match="does not exist"):
        restore(other, tmp_path / "none.ckpt")
    with pytest.raises(qat.LoadError, match="is a directory of shards"):
        restore(other, tmp_path)
    (tmp_path / "text.ckpt").write_text("hello")
    with pytest.raises(qat.LoadError, match="is no checkpoint of tensors and plain data, or a damaged one"):
        restore(other, tmp_path / "text.ckpt")
    torch.save(module.state_dict(), tmp_path / "state.pt")
    with pytest.raises(qat.LoadError, match="does not tell how its model was prepared"):
        restore(other, tmp_path / "state.pt")
    with pytest.raises(qat.LoadError, match="give the architecture that was trained"):
        restore(other, path)
    data = bytearray(path.read_bytes())
    for place in (len(data) // 2, len(data) // 3):  # within tensors, which a zip file has a checksum of
        flipped = bytearray(data)
        flipped[place] ^= 1
        (tmp_path / "flipped.ckpt").write_bytes(flipped)
        (tmp_path / "flipped.json").write_text(json.dumps({"sha256": hashlib.sha256(data).hexdigest()}))
        with pytest.raises(qat.LoadError, match=r"is damaged: flipped.json has another SHA-256"):
            restore(UserModule().model, tmp_path / "flipped.ckpt")
    found = torch.load(path, weights_only=True)
    del found["quantization"]["prepared"]["spec"]
    torch.save(found, tmp_path / "old.ckpt")
    with pytest.raises(qat.LoadError, match="a preparation that this release of qat does not know"):
        restore(UserModule().model, tmp_path / "old.ckpt")
    assert type(other[0]) is nn.Linear  # nothing was changed
