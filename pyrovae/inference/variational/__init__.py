"""Learning model and guide by any objective of Pyro: minibatches, schedules, true bounds, checkpoints."""

from pyrovae.inference.variational.variational import Variational

__all__ = ["Variational"]
