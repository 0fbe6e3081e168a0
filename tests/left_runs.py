"""What a recipe leaves on the disk, for the tests of pages about it."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path

from PIL import Image

import qat
from qat.run_report import read_run
from tests.exports import frozen_llama

__all__ = ["left_run"]


def left_run(folder: Path) -> Path:
    """A run as a recipe leaves it: the export, results, peers, logs of a run that went on, and a picture."""
    qat.export(frozen_llama("transformers", weights="int8", activations="int8"), folder / "run", config={"seed": 1})
    row = {"steps": 4, "learning_rate": 1e-4, "bytes_on_disk": 2048, "comparison": None}
    compared = {"reference": "float & <small>", "difference": 0.5, "standard_error": 0.01}
    metrics = {"loss": 2.5, "loss_bin_0": 0.5, "loss_bin_1": None}
    rows = [{"name": "float & <small>", "metrics": metrics, **row}, {"name": "trained", "metrics": metrics, **row}]
    rows[-1]["comparison"] = compared
    (folder / "run-results.json").write_text(json.dumps(rows))
    peer = {"name": "another library", "metrics": {"loss": 2.75, "accuracy": 0.5}, "steps": 0, "bytes_on_disk": 4096}
    (folder / "run-peers.json").write_text(json.dumps([peer]))
    (folder / "run-samples.json").write_text(json.dumps([{"prompt": "Once <b>", "trained": "upon"}]))
    layer = next(iter(read_run(folder / "run", codes=False).layers))
    column = f"quantization/{layer}/int8/error"
    for stage, steps in (("training", range(4)), ("training-from-2", range(2, 6))):
        path = folder / "run-logs" / stage / "metrics.csv"
        path.parent.mkdir(parents=True)
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["epoch", "step", "train_loss", column])
            writer.writeheader()
            for step in steps:
                loss = 9.0 if stage == "training" and step >= 2 else 3.0 - step / 10
                writer.writerow({"epoch": 0, "step": step, "train_loss": loss, column: 0.1 if step % 2 else ""})
    os.utime(folder / "run-logs" / "training", (2**32, 2**32))  # clocks jump, and copies have other times
    os.utime(folder / "run-logs" / "training" / "metrics.csv", (2**32, 2**32))
    Image.new("RGB", (8, 8)).save(folder / "run-images.png")
    return folder / "run"
