"""What can be spread over processes, said before any of it is."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from strata.errors import ConfigError
from strata.train.sharding import check_splits


def test_a_single_number_cannot_be_split() -> None:
    model = nn.ModuleDict({"gate": nn.Linear(2, 2)})
    check_splits(model)
    model["gate"].scale = nn.Parameter(torch.zeros(()))
    with pytest.raises(ConfigError, match=r"cannot split gate\.scale, .*dense=replicated"):
        check_splits(model)
