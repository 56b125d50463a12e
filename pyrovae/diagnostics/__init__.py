"""How far a fitted pair of model and guide can be trusted."""

from pyrovae.diagnostics.evaluate import Evaluation, evaluate
from pyrovae.diagnostics.gaps import VariationalGaps, variational_gaps
from pyrovae.diagnostics.temperature import TemperatureCurve, temperature_curve

__all__ = ["Evaluation", "TemperatureCurve", "VariationalGaps", "evaluate", "temperature_curve", "variational_gaps"]
