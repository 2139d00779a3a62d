"""Guidance: steer a sample away from a weaker prediction of the same model."""

from .nag import NAG
from .pag import PAG
from .perturbed import PerturbedGuidance
from .pladis import PLADIS
from .seg import SEG
from .slg import SLG
from .softpag import SoftPAG
from .temperature import TemperatureGuidance
from .tpg import TPG
from .uniform import UniformGuidance

__all__ = [
    "NAG",
    "PAG",
    "PLADIS",
    "SEG",
    "SLG",
    "TPG",
    "PerturbedGuidance",
    "SoftPAG",
    "TemperatureGuidance",
    "UniformGuidance",
]
