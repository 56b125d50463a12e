"""Plots: of a comparison, of one trained model, and grids of images.

Every function returns a matplotlib `Figure` made without pyplot: no window, no global state.
"""

from pyrovae.plots.comparison import inference_errors, learned, learning_curves, marginals
from pyrovae.plots.images import GAP, image_grid, reconstruction_grid, samples_grid
from pyrovae.plots.trained import RELAXED, SILENT, are_steps, latents, temperature_curve, training_curve

__all__ = [
    "GAP",
    "RELAXED",
    "SILENT",
    "are_steps",
    "image_grid",
    "inference_errors",
    "latents",
    "learned",
    "learning_curves",
    "marginals",
    "reconstruction_grid",
    "samples_grid",
    "temperature_curve",
    "training_curve",
]
