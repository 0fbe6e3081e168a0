"""Training with Lightning: the callback for a module that a user already has, and a generic module for the recipes.

Lightning trains, shards and resumes; this room only decides *when* quantization happens. Nothing before it knows
Lightning, so a plain loop needs none of it.
"""

from qat.training.callback import QuantizationAwareTraining
from qat.training.schedule import QuantizationSchedule
from qat.training.task import QuantizedTask

__all__ = ["QuantizationAwareTraining", "QuantizationSchedule", "QuantizedTask"]
