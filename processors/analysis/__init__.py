"""Look at what a model does; change nothing."""

from .heatmap import HeatMap
from .token_maps import TokenMaps
from .token_mass import token_mass
from .word_maps import Heatmaps, heatmaps

__all__ = ["HeatMap", "Heatmaps", "TokenMaps", "heatmaps", "token_mass"]
