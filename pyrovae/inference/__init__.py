"""Inference methods: each takes any Pyro program and returns an account of how far it can be trusted."""

from pyrovae.inference.ais import AIS, LogPartition, Sandwich
from pyrovae.inference.belief_nets.pretraining import GreedyPretraining
from pyrovae.inference.belief_nets.up_down import UpDown
from pyrovae.inference.belief_nets.wake_sleep import WakeSleep
from pyrovae.inference.capture.captured_svi import CapturedSVI
from pyrovae.inference.elbo import ExactLikelihood
from pyrovae.inference.em import EM
from pyrovae.inference.exact.exact import Exact, ExactPosterior
from pyrovae.inference.exact.factorial import FactorialPosterior
from pyrovae.inference.exact.linear_code import LinearCodePosterior
from pyrovae.inference.fit import Fit
from pyrovae.inference.importance import Importance
from pyrovae.inference.mcmc import MCMC, Gibbs, GibbsKernel
from pyrovae.inference.mean_field.mean_field import MeanField
from pyrovae.inference.mean_field.saul_jaakkola_jordan import SaulJaakkolaJordan
from pyrovae.inference.posterior import Posterior
from pyrovae.inference.undirected.contrastive import ContrastiveDivergence
from pyrovae.inference.undirected.tempering import ParallelTempering, TemperedDraws
from pyrovae.inference.variational.variational import Variational

__all__ = [
    "AIS",
    "EM",
    "MCMC",
    "CapturedSVI",
    "ContrastiveDivergence",
    "Exact",
    "ExactLikelihood",
    "ExactPosterior",
    "FactorialPosterior",
    "Fit",
    "Gibbs",
    "GibbsKernel",
    "GreedyPretraining",
    "Importance",
    "LinearCodePosterior",
    "LogPartition",
    "MeanField",
    "ParallelTempering",
    "Posterior",
    "Sandwich",
    "SaulJaakkolaJordan",
    "TemperedDraws",
    "UpDown",
    "Variational",
    "WakeSleep",
]
