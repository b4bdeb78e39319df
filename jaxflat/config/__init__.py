"""Configurations: each key once, with its default, its meaning and its bounds.

A config file's `get_config(scale)` starts from `base()`. Its optional `get_sweep(scale)` lists the
points of a sweep. Flags (`--config.model.width=32`) override both. `custom(function)` makes a
user's own function a choice of the config.
"""

from jaxflat.config.base import base as base
from jaxflat.config.base import phase as phase
from jaxflat.config.flatness import MEASURES as MEASURES
from jaxflat.config.functions import custom as custom
from jaxflat.config.paper import paper_grammar as paper_grammar
from jaxflat.config.paper import paper_hmm as paper_hmm
from jaxflat.config.ranges import Config as Config
from jaxflat.config.sizes import use_gpu_sizes as use_gpu_sizes
from jaxflat.config.sizes import use_paper_sizes as use_paper_sizes
from jaxflat.config.sizes import use_smoke_sizes as use_smoke_sizes
from jaxflat.config.sweeps import Sweep as Sweep
from jaxflat.config.sweeps import arm as arm
from jaxflat.config.sweeps import chain as chain
from jaxflat.config.sweeps import named_scale as named_scale
from jaxflat.config.sweeps import param as param
from jaxflat.config.sweeps import product as product
from jaxflat.config.sweeps import seeds as seeds
from jaxflat.config.sweeps import zipped as zipped
