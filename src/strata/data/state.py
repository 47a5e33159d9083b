"""What `prepare` notes while it works: enough for a new process to go on."""

from __future__ import annotations

from pathlib import Path

from pydantic import Field, ValidationError

from strata.config import FrozenConfig
from strata.data.manifest import (
    MANIFEST_NAME,
    PreparedFrom,
    ShardEntry,
    read_manifest,
    refuse_other_origin,
)
from strata.data.spill import RunEntry
from strata.errors import DataError

WORK_NAME = ".prepare"
_STATE_NAME = "state.json"


class SplitState(FrozenConfig):
    """How far the merge of one split has come: whole shards, and the key that follows them."""

    shards: tuple[ShardEntry, ...] = ()
    next_key: int = 0
    done: bool = False


class State(FrozenConfig):
    """Everything a new process needs to go on."""

    prepared_from: PreparedFrom
    position_source: int = 0
    position_record: int = 0
    num_empty: int = 0
    num_dropped: dict[str, int] = Field(default_factory=dict)
    runs: tuple[RunEntry, ...] = ()
    scattered: bool = False
    matched: bool = False
    train: SplitState = SplitState()
    val: SplitState = SplitState()


def state_path(work: Path) -> Path:
    """Where the state of a working folder stands."""
    return work / _STATE_NAME


def load_state(work: Path, out: Path, prepared_from: PreparedFrom) -> State | None:
    """The state in a working folder; None where nothing of these arguments was done.

    Raises:
        DataError: it belongs to other arguments, or is damaged.
    """
    state = _read(state_path(work), out)
    if state is None or (not state.runs and state.prepared_from != prepared_from):
        return None
    refuse_other_origin(out, state.prepared_from, prepared_from)
    return state


def recorded_origin(out: Path) -> PreparedFrom | None:
    """What an earlier call on a folder, finished or not, said that it is made from.

    Raises:
        DataError: its manifest or state is damaged.
    """
    if (out / MANIFEST_NAME).is_file():
        return read_manifest(out).prepared_from
    state = _read(state_path(out / WORK_NAME), out)
    return state.prepared_from if state is not None else None


def _read(path: Path, out: Path) -> State | None:
    if not path.is_file():
        return None
    try:
        return State.model_validate_json(path.read_bytes())
    except ValidationError:
        raise DataError(f"{path} is damaged or of another version: delete {out}") from None
