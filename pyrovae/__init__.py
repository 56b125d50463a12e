"""Know how wrong your fit is.

A latent-variable model is written once, as an ordinary Pyro program. Exact enumeration, EM, MCMC and variational
inference are put to it, and every number that comes out says whether it is exact, a bound or an estimate.

>>> from pyrovae.models import toy
>>> from pyrovae.inference import Exact
>>> net = toy.belief_net(visible=4, hidden=2)
>>> posterior = Exact().infer(net, net.sample(3))
>>> posterior.bound, tuple(posterior.log_evidence.shape)
('exact', (3,))
"""

__version__ = "0.1.0"
