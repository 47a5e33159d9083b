"""Supervised fine-tuning and DPO with TRL's trainers, of decoders that read explicit memory.

Nothing here imports TRL before a run begins or `strata.train.tune.trainers` is imported.
"""

from strata.train.tune.recipe import DPORecipe, PairsConfig, SFTRecipe, TuneReading
from strata.train.tune.run import TuneResult, dpo, sft

__all__ = [
    "DPORecipe",
    "PairsConfig",
    "SFTRecipe",
    "TuneReading",
    "TuneResult",
    "dpo",
    "sft",
]
