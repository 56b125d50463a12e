"""How far a fitted pair of model and guide can be trusted."""

from pyrovae.diagnostics.evaluate import Evaluation, evaluate
from pyrovae.diagnostics.temperature import TemperatureCurve, temperature_curve

__all__ = ["Evaluation", "TemperatureCurve", "evaluate", "temperature_curve"]
