"""Statistics of quantized tensors, compared with plain computations in float64, group by group."""

from __future__ import annotations

import math

import pytest
import torch

from qat.formats import QUANTO
from qat.training.statistics import activation_statistics, weight_statistics


@pytest.mark.parametrize("name", ["int8", "int4", "int2", "float8"])
def test_statistics_of_a_weight_are_those_of_a_plain_computation(name: str) -> None:
    qtype, weight = QUANTO.qtypes[name], torch.randn(6, 256)
    weight[2] = 0.0
    scale, shift = qtype.serve(*qtype.scale_shift(*qtype.weight_range(weight)), torch.float32, 256)
    scale = scale.clone()
    scale[0] *= 1e-5
    value = qtype.fake_quantize(weight, scale, shift, torch.float32, torch.float32)
    codes = qtype.encode(weight, scale, shift)
    found = weight_statistics(weight, value, codes, scale, qtype)
    groups, values, coded = (qtype.grouped(t).double() for t in (weight, value, codes))
    rows = range(len(groups))
    used = [len(coded[row].unique()) for row in rows]
    end = 32 if name == "float8" else 1
    beyond = sum(int(((groups[row] - values[row]).abs() > end * scale[row].double()).sum()) for row in rows)
    spans = [float(coded[row].max() - coded[row].min()) / (qtype.code_max - qtype.code_min) for row in rows]
    logs = [math.log2(float(one)) for one in scale if one > 0]
    assert float(found.error) == pytest.approx(float((groups - values).norm() / groups.norm()), rel=1e-5)
    assert float(found.saturated) == pytest.approx(beyond / weight.numel())
    assert float(found.dead) == pytest.approx(sum(count <= 2 for count in used) / len(used))
    assert float(found.code_use) == pytest.approx(sum(spans) / len(spans), rel=1e-6)
    assert float(found.collapsed) == pytest.approx(1 / len(used))
    assert float(found.log2_scale) == pytest.approx(sum(logs) / len(logs), rel=1e-5)


def test_statistics_of_an_activation_are_those_of_a_plain_computation() -> None:
    x, scale = torch.randn(4, 64), torch.tensor(0.01)
    found = activation_statistics(x, scale, QUANTO.qtypes["int8"], torch.float32)
    value = (x / scale).round().clamp(-128, 127) * scale
    assert float(found.error) == pytest.approx(float((x - value).norm() / x.norm()), rel=1e-5)
    assert float(found.saturated) == pytest.approx(float((x.abs() > 1.28).float().mean()), abs=0.01)
    assert float(found.code_use) == 1.0
