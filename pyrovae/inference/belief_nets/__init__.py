"""Learning belief nets by other means than a bound: wake and sleep, layer by layer, up and down."""

from pyrovae.inference.belief_nets.pretraining import GreedyPretraining
from pyrovae.inference.belief_nets.up_down import UpDown
from pyrovae.inference.belief_nets.wake_sleep import WakeSleep

__all__ = ["GreedyPretraining", "UpDown", "WakeSleep"]
