"""Decoders with memory as ordinary transformers models. May import layers (and ops under them)."""

from strata.models.build import ModelConfig, build, load
from strata.models.count import Counts, count
from strata.models.registration import HOSTS, install, install_experts, register_hosts, strata_class
from strata.models.storage import quantize_values

__all__ = [
    "HOSTS",
    "Counts",
    "ModelConfig",
    "build",
    "count",
    "install",
    "install_experts",
    "load",
    "quantize_values",
    "register_hosts",
    "strata_class",
]
