"""Generative models p(x, z), each an ordinary Pyro program: no objective, no optimiser, no data set."""

from pyrovae.models.autoencoder import AutoEncoder
from pyrovae.models.bernoulli_mixture import BernoulliMixture
from pyrovae.models.bernoulli_vae import BernoulliVAE
from pyrovae.models.boltzmann import BoltzmannMachine, RestrictedBoltzmannMachine
from pyrovae.models.categorical_vae import CategoricalVAE
from pyrovae.models.deep_belief_net import DeepBeliefNet
from pyrovae.models.draw import DRAW
from pyrovae.models.gaussian_mixture import GaussianMixture
from pyrovae.models.gaussian_vae import GaussianVAE
from pyrovae.models.hidden_markov_model import HiddenMarkovModel
from pyrovae.models.hierarchical_vae import HierarchicalVAE
from pyrovae.models.mixed_vae import MixedVAE
from pyrovae.models.sigmoid_belief_net import SigmoidBeliefNet

__all__ = [
    "DRAW",
    "AutoEncoder",
    "BernoulliMixture",
    "BernoulliVAE",
    "BoltzmannMachine",
    "CategoricalVAE",
    "DeepBeliefNet",
    "GaussianMixture",
    "GaussianVAE",
    "HiddenMarkovModel",
    "HierarchicalVAE",
    "MixedVAE",
    "RestrictedBoltzmannMachine",
    "SigmoidBeliefNet",
]
