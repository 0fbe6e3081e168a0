"""The lines of stock optimum-quanto, and the same work here, with equal codes where nothing is learned."""

import copy

import torch
from optimum.quanto import (
    Calibration,
    QuantizedModelForCausalLM,
    freeze,
    qint8,
    quantization_map,
    quantize,
    requantize,
)
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import qat

floats = torch.nn.Sequential(torch.nn.Linear(256, 128), torch.nn.ReLU(), torch.nn.Linear(128, 64))
batch = torch.randn(8, 256)

# stock
theirs = copy.deepcopy(floats)
quantize(theirs, weights=qint8, activations=qint8, exclude="2")
with Calibration():
    theirs(batch)
theirs(batch).square().mean().backward()  # your loop
freeze(theirs)
save_file(theirs.state_dict(), "theirs.safetensors")
again = copy.deepcopy(floats)
requantize(again, load_file("theirs.safetensors"), quantization_map(theirs))

# here
ours = copy.deepcopy(floats)
spec = qat.QuantSpec(weights="int8", activations="int8", dtype="float32", exclude=("2",))
qat.prepare(ours, spec, target="quanto")
qat.calibrate(ours, [batch])
ours(batch).square().mean().backward()  # your loop
qat.freeze(ours)
qat.export(ours, "ours", example_inputs=batch, overwrite=True)
served = qat.load("ours", model=floats)
assert torch.equal(theirs[0].weight._data, served[0].weight._data)

# stock, a whole model of transformers; the lines for it here are those of the start page
model = AutoModelForCausalLM.from_pretrained("recipes/reference", dtype=torch.float32)
QuantizedModelForCausalLM.quantize(model, weights=qint8, exclude="lm_head").save_pretrained("their-model")
QuantizedModelForCausalLM.from_pretrained("their-model")
