"""A vision transformer with int8 weights and activations, trained with labels."""

import torch
from transformers import AutoModelForImageClassification

import qat

model = AutoModelForImageClassification.from_pretrained("recipes/reference_vit", dtype=torch.float32)
size, channels = model.config.image_size, model.config.num_channels
batches = [  # yours: images of your own, as the model's image processor makes them
    {"pixel_values": torch.randn(8, channels, size, size), "labels": torch.randint(0, model.config.num_labels, (8,))}
    for _ in range(2)
]

qat.prepare(model, qat.QuantSpec(weights="int8", activations="int8"), target="transformers")
print(qat.calibrate(model, batches))  # scales of activations; layers that cannot bear them keep float ones
optimizer = torch.optim.AdamW(qat.parameter_groups(model, lr=1e-5, weight_decay=0.01))
for batch in batches:
    model(**batch).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
qat.calibrate(model, batches)  # training has moved the activations

qat.freeze(model)
example = {"pixel_values": batches[0]["pixel_values"]}
qat.export(model, "my-vit-w8a8", example_inputs=example, overwrite=True)
print(qat.verify("my-vit-w8a8", reference=model))
