"""Algebra on adapters in the space of weight changes: combine, compress, convert and extract, for every method.

    both = [AdapterDeltas(model_a), AdapterDeltas(model_b)]
    result = combine(both, [0.7, 0.3])
    result.write("folder", result.config(base))

The result is always a plain LoRA of PEFT with scaling 1, and says how far it is from what was asked for.
"""

from .combine import HOWS, SUMS, combine, merged_deltas
from .deltas import Delta, LayerDelta, Layout, SavedDelta, TokenDelta
from .expect import apply_delta, expecting
from .extract import extract, extract_deltas
from .factor import NOISE, Cut, Spectrum, spectrum
from .reduce import Compressed, Guard, attach, compress, convert
from .result import Factors, LoraResult, ModuleError, factorise
from .source import AdapterDeltas, delta_weights, share

__all__ = [
    "HOWS",
    "NOISE",
    "SUMS",
    "AdapterDeltas",
    "Compressed",
    "Cut",
    "Delta",
    "Factors",
    "Guard",
    "LayerDelta",
    "Layout",
    "LoraResult",
    "ModuleError",
    "SavedDelta",
    "Spectrum",
    "TokenDelta",
    "apply_delta",
    "attach",
    "combine",
    "compress",
    "convert",
    "delta_weights",
    "expecting",
    "extract",
    "extract_deltas",
    "factorise",
    "merged_deltas",
    "share",
    "spectrum",
]
