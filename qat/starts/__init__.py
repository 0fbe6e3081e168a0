"""What training starts from: ranges of weights, and perhaps compensated weights. One file a start, one entry each here.

Ranges are found from the weight alone, or from the layer's inputs on calibration batches too. Min-max needs no file:
it is `QType.weight_range`.
"""

from __future__ import annotations

from qat.starts.base import DataStart, Ends, RangeStart, Start, output_error
from qat.starts.best import best_start, gptq_start
from qat.starts.clip import clipped_range
from qat.starts.hqq import half_quadratic_range
from qat.starts.lsq import step_size_range
from qat.starts.output import output_start
from qat.starts.seq import balanced_range

__all__ = ["DATA_STARTS", "RANGE_STARTS", "Ends", "Start", "output_error"]

RANGE_STARTS: dict[str, RangeStart] = {
    "minmax": lambda weight, qtype, _: qtype.weight_range(weight),
    "clip": clipped_range,
    "lsq": step_size_range,
    "hqq": half_quadratic_range,
    "seq": balanced_range,
}
"""Starts that read the weight alone."""
DATA_STARTS: dict[str, DataStart] = {"output": output_start, "gptq": gptq_start, "best": best_start}
"""Starts that need the second moments of the layer's inputs."""
