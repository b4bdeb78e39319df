"""Claims on seeds and on settings, of a sweep whose optimum is known."""

from jaxflat.analysis import effects
from jaxflat.analysis.loss_scale import EXCESS_LOSS

WITHIN, ACROSS = map(EXCESS_LOSS.claim, (effects.WITHIN, effects.ACROSS))
