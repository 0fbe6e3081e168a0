"""What a model is trained to do: the loss and the metrics of a task, knowing nothing of quantization.

A task is one file here. It needs torch and torchmetrics only, so that the same loss trains a float model, a prepared
one and a frozen one, and no result can depend on who computed it.
"""

from __future__ import annotations

from qat.tasks.base import Batch, Task, evaluate, move
from qat.tasks.causal_lm import CausalLanguageModelling
from qat.tasks.diffusion import Diffusion

__all__ = ["Batch", "CausalLanguageModelling", "Diffusion", "Task", "evaluate", "move"]
