"""Generative models p(x, z), each an ordinary Pyro program: no objective, no optimiser, no data set."""

from pyrovae.models.sigmoid_belief_net import SigmoidBeliefNet

__all__ = ["SigmoidBeliefNet"]
