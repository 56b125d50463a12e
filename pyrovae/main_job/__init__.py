"""The main job: a model of one family, every kind of learning, then every kind of inference on one learned model.

Judged on real data by exact enumeration wherever it fits. `pyrovae compare` is this, on the command line.
"""

from pyrovae.main_job.families import FAMILIES, Family, Task
from pyrovae.main_job.job import MainJob, choose, heading, run
from pyrovae.main_job.settings import BUDGETS, Settings, load, parse_methods

__all__ = ["BUDGETS", "FAMILIES", "Family", "MainJob", "Settings", "Task", "choose", "heading", "load", "parse_methods", "run"]
