"""What recipes share: what they start from (`models`), the fit and what surrounds it (`training`, `calibration`), what
they show and keep (`callbacks`, `pictures`), and what all diffusion recipes do (`diffusion`, `comparison`).
"""

from recipes.common.calibration import calibrate, calibrate_and_freeze
from recipes.common.callbacks import LastCheckpoint, StepProgress, checkpoints_in
from recipes.common.comparison import DiffusionComparison
from recipes.common.diffusion import DiffusionConfig, DiffusionData, diffusion_data, inspected, source_of
from recipes.common.models import load_language_model, load_pipeline, require_packages
from recipes.common.pictures import draw_images, plot_losses, show_grid
from recipes.common.training import device_of, fit, training_batches

__all__ = [
    "DiffusionComparison",
    "DiffusionConfig",
    "DiffusionData",
    "LastCheckpoint",
    "StepProgress",
    "calibrate",
    "calibrate_and_freeze",
    "checkpoints_in",
    "device_of",
    "diffusion_data",
    "draw_images",
    "fit",
    "inspected",
    "load_language_model",
    "load_pipeline",
    "plot_losses",
    "require_packages",
    "show_grid",
    "source_of",
    "training_batches",
]
