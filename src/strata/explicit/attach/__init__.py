"""Reading: a decoder's attention over memories, and when they change while it generates."""

from strata.explicit.attach import presets
from strata.explicit.attach.fetch import (
    AttachError,
    FoundHit,
    RetrievalError,
    Source,
    Statistics,
)
from strata.explicit.attach.presets import Preset
from strata.explicit.attach.refresh import Used, UsedMemory
from strata.explicit.attach.session import Session, attach

__all__ = [
    "AttachError",
    "FoundHit",
    "Preset",
    "RetrievalError",
    "Session",
    "Source",
    "Statistics",
    "Used",
    "UsedMemory",
    "attach",
    "presets",
]
