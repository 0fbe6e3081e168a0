"""The lines of torchao, and the same work here. Needs torchao: the extra `benchmark`."""

import torch
from torch import nn
from torchao.quantization import Int4WeightOnlyConfig, IntxWeightOnlyConfig, PerGroup, quantize_
from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
from transformers import AutoModelForCausalLM

import qat


def load():
    return AutoModelForCausalLM.from_pretrained("recipes/reference", dtype=torch.bfloat16)


batch = {"input_ids": torch.arange(64).reshape(2, 32)}

# torchao
theirs = load()
base = IntxWeightOnlyConfig(torch.int4, PerGroup(32))
quantize_(theirs, QATConfig(base, step="prepare"))
theirs(**batch, labels=batch["input_ids"]).loss.backward()  # your loop
quantize_(theirs, QATConfig(base, step="convert"))
assert type(theirs.lm_head.weight.data) is not torch.Tensor  # the head too, unless filter_fn leaves it out

# here
ours = load()
spec = qat.QuantSpec(weights="int4_g32_zp")
qat.prepare(ours, spec, target="compressed-tensors")
qat.calibrate(ours, [batch])
ours(**batch, labels=batch["input_ids"]).loss.backward()  # your loop
qat.freeze(ours)
qat.export(ours, "my-model", example_inputs=batch, overwrite=True)
assert qat.verify("my-model", reference=ours).ok

# torchao's other forms
quantize_(load(), QATConfig(Int4WeightOnlyConfig(group_size=32), step="prepare"))  # to convert it needs a package, mslk
weights = IntxFakeQuantizeConfig(torch.int4, group_size=32)
own = load()
step = QATConfig(weight_config=weights, step="prepare")
quantize_(own, step, filter_fn=lambda module, name: isinstance(module, nn.Linear) and "mlp" in name)
quantize_(own, step, filter_fn=lambda module, name: isinstance(module, nn.Embedding))
quantize_(own, QATConfig(step="convert"))  # without a base, floats come back, and nothing is quantized
assert type(own.model.layers[0].mlp.down_proj) is nn.Linear
