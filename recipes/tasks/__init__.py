"""What a model is trained to do: the loss and the metrics of a task, knowing nothing of quantization.

A task is one file here, and a `qat.training.task.Task`. It needs torch and torchmetrics only, so that the same loss
trains a float model, a prepared one and a frozen one, and no result can depend on who computed it.
"""

from recipes.tasks.causal_lm import CausalLanguageModelling
from recipes.tasks.classification import Classification
from recipes.tasks.diffusion import Diffusion
from recipes.tasks.evaluation import Batch, evaluate

__all__ = ["Batch", "CausalLanguageModelling", "Classification", "Diffusion", "evaluate"]
