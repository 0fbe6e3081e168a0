"""An image classifier, from float to a verified quantized checkpoint.

    python -m recipes.image_classification [config.yaml] [--spec.weights int4 --optimization.steps 200 ...]

Fine-tunes a float vision transformer, and goes on from there with fake quantization of weights and activations, on the
same batches in the same order. Then compares four models on held-out images: the float one, the fine-tuned one, that
one quantized after training, and the quantization-aware one, which is frozen, exported, verified in a fresh process
and judged *as reloaded*.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import qat
from qat.report import run_command
from recipes import command
from recipes.common.config import load_config
from recipes.common.settings import ClassifierConfig
from recipes.data.labelled_images import LabelledImageData

REFERENCE = Path(__file__).parent / "reference_vit"


class Config(ClassifierConfig):
    """An image classifier, from float to a verified quantized checkpoint."""

    data: LabelledImageData = LabelledImageData()
    """The images to train and to evaluate on."""


def main(argv: Sequence[str]) -> None:
    config = load_config(Config, argv, str(Config.__doc__), prog=command("image_classification"))
    from qat.hosts.pretrained import check_folder
    from recipes.common.experiment import Examples, compare  # these take seconds: a wrong option is told before
    from recipes.common.models import load_classifier, load_teacher
    from recipes.common.progress import quiet_libraries, stage
    from recipes.common.run import begin
    from recipes.data.labelled_images import ImageBatch, load_labelled_images
    from recipes.data.labels import for_model
    from recipes.tasks import Classification

    quiet_libraries()
    run, source = begin("image_classification", config), config.model or str(REFERENCE)
    check_folder(source, "model")  # before the data
    with stage("reading images"):
        found = load_labelled_images(config.data)
    print(found)
    new = found.classes if config.new_head else None
    trust = config.trust_remote_code
    model, processor = load_classifier(source, "image", new_classes=new, trust_remote_code=trust)
    teacher = load_teacher(config, lambda path: load_classifier(path, "image", trust_remote_code=trust)[0])
    found = for_model(found, model.config.id2label, repr(config.data.source or "digits"))
    qat.inspect(model, config.spec, target=config.target)
    examples = Examples(found.train, found.evaluation, ImageBatch(processor))
    compare(config, run, model, processor, Classification(classes=len(found.classes)), examples, teacher)


if __name__ == "__main__":
    run_command(main)
