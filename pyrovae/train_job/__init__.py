"""Train one model on images, keep it in a folder, draw from it and judge it.

`pyrovae train`, `pyrovae sample` and `pyrovae evaluate` are this, on the command line.
"""

from pyrovae.train_job.families import FAMILIES, OPTIONS, parse_layers
from pyrovae.train_job.folder import Run, check_same, has_checkpoint, load_run, progress_of, read_config, settings_of
from pyrovae.train_job.job import evaluate_run, reconstructions, sample, train
from pyrovae.train_job.settings import Settings, resolved, sizes_of, title_of, word_of

__all__ = [
    "FAMILIES",
    "OPTIONS",
    "Run",
    "Settings",
    "check_same",
    "evaluate_run",
    "has_checkpoint",
    "load_run",
    "parse_layers",
    "progress_of",
    "read_config",
    "reconstructions",
    "resolved",
    "sample",
    "settings_of",
    "sizes_of",
    "title_of",
    "train",
    "word_of",
]
