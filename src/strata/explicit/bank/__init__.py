"""The bank: references, their vectors and their memories, in one Lance dataset in a folder."""

from strata.explicit.bank.bank import Bank
from strata.explicit.bank.info import SourceInfo, Stats, VersionInfo
from strata.explicit.bank.intake import AddReport
from strata.explicit.bank.records import Record
from strata.explicit.bank.upkeep import CompactReport
from strata.explicit.bank.verify import VerifyReport
from strata.explicit.hits import Hit

__all__ = [
    "AddReport",
    "Bank",
    "CompactReport",
    "Hit",
    "Record",
    "SourceInfo",
    "Stats",
    "VerifyReport",
    "VersionInfo",
]
