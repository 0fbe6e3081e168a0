"""Types of the lazily imported names; see `__init__.py`."""

from qat.allocation import LayerChoice as LayerChoice
from qat.allocation import SearchReport as SearchReport
from qat.allocation import search as search
from qat.calibration import CalibrationReport as CalibrationReport
from qat.calibration import calibrate as calibrate
from qat.codes_only import FixCodesReport as FixCodesReport
from qat.codes_only import fix_codes as fix_codes
from qat.conversion import convert as convert
from qat.errors import *  # noqa: F403
from qat.exporting import ExportReport as ExportReport
from qat.exporting import export as export
from qat.folding import FoldReport as FoldReport
from qat.folding import fold_outliers as fold_outliers
from qat.freezing import FreezeReport as FreezeReport
from qat.freezing import freeze as freeze
from qat.inspection import InspectReport as InspectReport
from qat.inspection import inspect as inspect
from qat.layers import QLinear as QLinear
from qat.loading import load as load
from qat.observers import Absmax as Absmax
from qat.observers import Best as Best
from qat.observers import MovingAverage as MovingAverage
from qat.observers import Mse as Mse
from qat.observers import Percentile as Percentile
from qat.packing import PackReport as PackReport
from qat.packing import pack_base as pack_base
from qat.preparation import PrepareReport as PrepareReport
from qat.preparation import parameter_groups as parameter_groups
from qat.preparation import prepare as prepare
from qat.quantizers import Algorithm as Algorithm
from qat.quantizers import AnyAlgorithm as AnyAlgorithm
from qat.quantizers import Automatic as Automatic
from qat.quantizers import DualLSQ as DualLSQ
from qat.quantizers import LearnedAffine as LearnedAffine
from qat.quantizers import LearnedClipping as LearnedClipping
from qat.quantizers import StraightThrough as StraightThrough
from qat.quantizers import StretchedElastic as StretchedElastic
from qat.quantizers import WeightQuantizer as WeightQuantizer
from qat.reconstruction import ReconstructionReport as ReconstructionReport
from qat.reconstruction import reconstruct as reconstruct
from qat.spec import LayerSpec as LayerSpec
from qat.spec import QuantSpec as QuantSpec
from qat.training.cage import cage_step as cage_step
from qat.training.callback import QuantizationAwareTraining as QuantizationAwareTraining
from qat.training.distillation import Distillation as Distillation
from qat.training.distillation import Distiller as Distiller
from qat.training.schedule import QuantizationSchedule as QuantizationSchedule
from qat.training.schedule import rate_factor as rate_factor
from qat.training.steps import QuantizationSteps as QuantizationSteps
from qat.training.task import QuantizedTask as QuantizedTask
from qat.training.teacher import CachedLogits as CachedLogits
from qat.training.teacher import cache_logits as cache_logits
from qat.verification import VerifyReport as VerifyReport
from qat.verification import verify as verify

__version__: str
