"""Inference methods: each takes any Pyro program and returns an account of how far it can be trusted."""

from pyrovae.inference.ais import AIS, LogPartition, Sandwich
from pyrovae.inference.contrastive import ContrastiveDivergence
from pyrovae.inference.elbo import ExactLikelihood
from pyrovae.inference.em import EM
from pyrovae.inference.exact import Exact, ExactPosterior
from pyrovae.inference.factorial import FactorialPosterior
from pyrovae.inference.fit import Fit
from pyrovae.inference.importance import Importance
from pyrovae.inference.linear_code import LinearCodePosterior
from pyrovae.inference.mcmc import MCMC, Gibbs, GibbsKernel
from pyrovae.inference.mean_field import MeanField
from pyrovae.inference.posterior import Posterior
from pyrovae.inference.pretraining import GreedyPretraining
from pyrovae.inference.saul_jaakkola_jordan import SaulJaakkolaJordan
from pyrovae.inference.tempering import ParallelTempering, TemperedDraws
from pyrovae.inference.up_down import UpDown
from pyrovae.inference.variational import Variational
from pyrovae.inference.wake_sleep import WakeSleep

__all__ = [
    "AIS",
    "EM",
    "MCMC",
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
