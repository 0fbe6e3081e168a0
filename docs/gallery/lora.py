"""LoRA on an int4 base: base and adapter are fake-quantized as one weight, and merged when frozen."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import qat

base = AutoModelForCausalLM.from_pretrained("recipes/reference", dtype=torch.float32)  # your model
batches = [{"input_ids": torch.randint(0, 4096, (2, 32))} for _ in range(2)]  # your data

model = get_peft_model(base, LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM"))
# With qat.Automatic(start="best") and qat.calibrate(model, batches) it begins nearer to float, and needs data.
qat.prepare(model, qat.QuantSpec(weights="int4"), target="transformers", algorithm=qat.LearnedAffine())
optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-3))
for batch in batches:
    model(**batch, labels=batch["input_ids"]).loss.backward()
    optimizer.step()
    optimizer.zero_grad()

qat.freeze(model)
qat.export(model, "my-lora-int4", example_inputs=batches[0], overwrite=True)
print(qat.verify("my-lora-int4", reference=model))
