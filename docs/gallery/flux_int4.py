"""A Flux transformer at int4, with starts from its own sampling; stock diffusers loads and draws with it.

The recipe `text_to_image` trains it too: at int4 that wins back four fifths of what the start `best` loses.
"""

import torch
from diffusers import AutoModel, FluxPipeline

import qat

SOURCE = "recipes/reference_flux"  # a directory or a hub name
CALL = {"height": 32, "width": 32, "max_sequence_length": 16, "num_inference_steps": 2, "output_type": "pt"}

pipeline = FluxPipeline.from_pretrained(SOURCE, dtype=torch.float32)
pipeline.set_progress_bar_config(disable=True)
model = pipeline.transformer
prompts = ["the digit three", "the digit seven"]  # yours: 64 and more, with the steps that you serve with

spec = qat.QuantSpec(weights="int4", dtype="bfloat16")
qat.prepare(model, spec, target="diffusers")  # algorithm=qat.Automatic(start="best") loses less, and takes longer
qat.calibrate(model, prompts, forward=lambda _, prompt: pipeline(prompt, **CALL))
qat.freeze(model)
qat.export(model, "my-flux-int4", overwrite=True)

# Everything below is stock diffusers. It does not use qat.
served = AutoModel.from_pretrained("my-flux-int4", dtype=torch.bfloat16)
drawing = FluxPipeline.from_pretrained(SOURCE, transformer=served, dtype=torch.bfloat16)
drawing.set_progress_bar_config(disable=True)
print(drawing("the digit three", **CALL).images.shape)
