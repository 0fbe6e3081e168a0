"""What recipes share: what they start from (`models`, `batches`), the fit and what surrounds it (`training`,
`calibration`), what they show and keep (`callbacks`, `fine_tuned`, `pictures`), and what diffusion recipes do
(`diffusion`, `diffusion_config`, `comparison`).
"""

from recipes.common.batches import require_whole_batch, training_batches
from recipes.common.calibration import calibrate, calibrate_and_freeze
from recipes.common.callbacks import LastCheckpoint, SeedNoise, StepProgress, checkpoints_in, step_of
from recipes.common.comparison import DiffusionComparison
from recipes.common.diffusion import DiffusionData, diffusion_data, inspected
from recipes.common.diffusion_config import DiffusionConfig, source_of
from recipes.common.fine_tuned import FineTunedWeights
from recipes.common.models import load_language_model, load_pipeline, require_packages
from recipes.common.pictures import draw_images, plot_losses, show_grid
from recipes.common.training import FitSettings, device_of, fit

__all__ = [
    "DiffusionComparison",
    "DiffusionConfig",
    "DiffusionData",
    "FineTunedWeights",
    "FitSettings",
    "LastCheckpoint",
    "SeedNoise",
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
    "require_whole_batch",
    "show_grid",
    "source_of",
    "step_of",
    "training_batches",
]
