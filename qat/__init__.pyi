"""Types of the lazily imported names; see `__init__.py`."""

from qat.calibration import CalibrationReport as CalibrationReport, calibrate as calibrate
from qat.errors import CalibrationError as CalibrationError, DataError as DataError, ExportError as ExportError, LoadError as LoadError, QatError as QatError, SpecError as SpecError, StateError as StateError, TargetError as TargetError, TrainingError as TrainingError, VerifyError as VerifyError
from qat.exporting import ExportReport as ExportReport, export as export
from qat.freezing import FreezeReport as FreezeReport, freeze as freeze
from qat.inspection import InspectReport as InspectReport, inspect as inspect
from qat.layers import QLinear as QLinear
from qat.loading import load as load
from qat.observers import Absmax as Absmax, Percentile as Percentile
from qat.preparation import PrepareReport as PrepareReport, parameter_groups as parameter_groups, prepare as prepare
from qat.quantizers import Algorithm as Algorithm, AnyAlgorithm as AnyAlgorithm, StraightThrough as StraightThrough, WeightQuantizer as WeightQuantizer
from qat.spec import LayerSpec as LayerSpec, QuantSpec as QuantSpec
from qat.training import QuantizationAwareTraining as QuantizationAwareTraining, QuantizationSchedule as QuantizationSchedule, QuantizedTask as QuantizedTask
from qat.verification import VerifyReport as VerifyReport, verify as verify

__version__: str
__all__ = [
    "Absmax",
    "Algorithm",
    "AnyAlgorithm",
    "CalibrationError",
    "CalibrationReport",
    "DataError",
    "ExportError",
    "ExportReport",
    "FreezeReport",
    "InspectReport",
    "LayerSpec",
    "LoadError",
    "Percentile",
    "PrepareReport",
    "QLinear",
    "QatError",
    "QuantSpec",
    "QuantizationAwareTraining",
    "QuantizationSchedule",
    "QuantizedTask",
    "SpecError",
    "StateError",
    "StraightThrough",
    "TargetError",
    "TrainingError",
    "VerifyError",
    "VerifyReport",
    "WeightQuantizer",
    "calibrate",
    "export",
    "freeze",
    "inspect",
    "load",
    "parameter_groups",
    "prepare",
    "verify",
]
