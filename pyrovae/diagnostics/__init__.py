"""How far a fitted pair of model and guide can be trusted."""

from pyrovae.diagnostics.evaluate import Evaluation, evaluate

__all__ = ["Evaluation", "evaluate"]
