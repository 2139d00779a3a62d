"""Latent-gradient controls: the latents move so that the maps of the prompt's words do better."""

from .a_star import AStar
from .attend_and_excite import AttendAndExcite
from .conform import Conform
from .disendiff import DisenDiff
from .divide_and_bind import DivideAndBind
from .initno import InitNO
from .syngen import SynGen

__all__ = ["AStar", "AttendAndExcite", "Conform", "DisenDiff", "DivideAndBind", "InitNO", "SynGen"]
