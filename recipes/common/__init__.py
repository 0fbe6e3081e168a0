"""What recipes share: the fit and what surrounds it (`training`), what it shows and keeps (`callbacks`), `models`."""

from recipes.common.callbacks import LastCheckpoint, StepProgress, checkpoints_in
from recipes.common.models import load_language_model
from recipes.common.training import calibrate_and_freeze, device_of, fit, training_batches

__all__ = [
    "LastCheckpoint",
    "StepProgress",
    "calibrate_and_freeze",
    "checkpoints_in",
    "device_of",
    "fit",
    "load_language_model",
    "training_batches",
]
