"""The lines of NVIDIA ModelOpt, and the same work here. Needs nvidia-modelopt, which the extras leave out."""

import modelopt.torch.opt as mto
import modelopt.torch.quantization as mtq
import torch
from modelopt.recipe import load_recipe
from modelopt.torch.quantization.plugins.transformers_trainer import QATTrainer, QuantizationArguments
from transformers import AutoModelForCausalLM, TrainingArguments

import qat


def load():
    return AutoModelForCausalLM.from_pretrained("recipes/reference", dtype=torch.float32)


batches = [{"input_ids": torch.arange(64).reshape(2, 32)}]

# ModelOpt
mto.enable_huggingface_checkpointing()
theirs = load()
recipe = load_recipe("general/ptq/int4_blockwise_weight_only")  # or mtq.INT8_DEFAULT_CFG: W8A8 has no recipe
mtq.quantize(theirs, recipe.quantize, lambda model: [model(**batch) for batch in batches])
optimizer = torch.optim.AdamW(theirs.parameters(), lr=1e-5)
theirs(**batches[0], labels=batches[0]["input_ids"]).loss.backward()  # your loop
optimizer.step()
theirs.save_pretrained("their-checkpoint")  # float weights and the state of the quantizers

# here
ours = load()
qat.prepare(ours, qat.QuantSpec(weights="int4"), target="transformers")
qat.calibrate(ours, batches)
optimizer = torch.optim.AdamW(qat.parameter_groups(ours, lr=1e-5))
ours(**batches[0], labels=batches[0]["input_ids"]).loss.backward()  # your loop
optimizer.step()
qat.freeze(ours)
qat.export(ours, "my-model", example_inputs=batches[0], overwrite=True)
assert qat.verify("my-model", reference=ours).ok

# ModelOpt's W8A8, by its own name, and here
mtq.quantize(load(), mtq.INT8_DEFAULT_CFG, lambda model: [model(**batch) for batch in batches])
w8a8 = load()
qat.calibrate(w8a8, batches, spec=qat.QuantSpec(activations="int8"), target="transformers")

# ModelOpt's trainer; docs/trainers.md has ours
arguments = TrainingArguments("their-run", max_steps=1, use_cpu=True, report_to=[], save_strategy="no")
rows = [{"input_ids": torch.arange(32), "labels": torch.arange(32)}] * 8
chosen = QuantizationArguments(recipe="general/ptq/int4_blockwise_weight_only")
QATTrainer(model=load(), args=arguments, train_dataset=rows, quant_args=chosen).train()
