from .base import LossTerms as LossTerms, Objective as Objective
from .bridge import OBJECTIVES as OBJECTIVES, build_objective as build_objective
from .samplers import DepthNoise as DepthNoise
