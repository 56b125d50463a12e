"""How far a fitted pair of model and guide can be trusted."""

from pyrovae.diagnostics.evaluate import Evaluation, evaluate
from pyrovae.diagnostics.gaps import VariationalGaps, variational_gaps
from pyrovae.diagnostics.partition_bound import PartitionBound, bound_with_partition
from pyrovae.diagnostics.temperature import TemperatureCurve, temperature_curve

__all__ = [
    "Evaluation",
    "PartitionBound",
    "TemperatureCurve",
    "VariationalGaps",
    "bound_with_partition",
    "evaluate",
    "temperature_curve",
    "variational_gaps",
]
