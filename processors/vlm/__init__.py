"""Vision-language models: what the answer attends to, and what it is decoded from."""

from .carving import Carved, Carver, carve
from .m3id import M3ID
from .pai import PAI
from .pai_cfg import PAICFG
from .sink_map import SinkMap, calibrate_sink_dims, sink_map
from .var import VAR
from .vcd import VCD

__all__ = [
    "M3ID",
    "PAI",
    "PAICFG",
    "VAR",
    "VCD",
    "Carved",
    "Carver",
    "SinkMap",
    "calibrate_sink_dims",
    "carve",
    "sink_map",
]
