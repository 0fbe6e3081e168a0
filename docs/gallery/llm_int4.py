"""A language model at int4, trained towards its float self, for transformers."""

import copy
import inspect

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import qat

SOURCE = "recipes/reference"  # a directory or a hub name
STEPS = 2  # yours: 80 and more

model = AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(SOURCE)
teacher = copy.deepcopy(model)
tokens = tokenizer(inspect.getsource(inspect), return_tensors="pt").input_ids[0]  # yours: your own text
batches = [{"input_ids": rows} for rows in tokens[: STEPS * 4 * 64].reshape(STEPS, 4, 64)]

qat.prepare(model, qat.QuantSpec(weights="int4"), target="transformers")
qat.calibrate(model, batches)  # where learned ranges begin
optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=5e-5))
rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: qat.rate_factor(step, STEPS))
distiller = qat.Distiller(model, teacher, qat.Distillation(hidden_states=1.0))
for batch in batches:
    _, loss = distiller(batch)
    loss.backward()
    optimizer.step()
    rates.step()
    optimizer.zero_grad()

qat.freeze(model)
qat.export(model, "my-llm-int4", processor=tokenizer, example_inputs=batches[0], overwrite=True)
print(qat.verify("my-llm-int4", reference=model))
