"""An encoder with int8 weights and activations, without training: some batches are enough."""

import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import qat

SOURCE = "recipes/reference_encoder"  # a directory or a hub name

model = AutoModelForSequenceClassification.from_pretrained(SOURCE, dtype=torch.float32)
tokenizer = AutoTokenizer.from_pretrained(SOURCE)
texts = ["import socket\n", "def mean(values):\n    return sum(values) / len(values)\n"]  # yours: 64 and more
batches = [tokenizer(text, return_tensors="pt") for text in texts]

report = qat.calibrate(model, batches, spec=qat.QuantSpec(weights="int8", activations="int8"), target="transformers")
print(report.table())  # scale, error, saturation and use of the range, for each input
qat.freeze(model)
qat.export(model, "my-bert-w8a8", processor=tokenizer, example_inputs=dict(batches[0]), overwrite=True)
print(qat.verify("my-bert-w8a8", reference=model))
