"""The SOURCEs of a user as one list of files: paths, data sets of the hub and mirrors of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from strata.data.hub.files import find_dataset, remote_sources
from strata.data.hub.names import DatasetName, parse_source
from strata.data.manifest import PreparedFrom
from strata.data.readers import ReadOptions, read_documents
from strata.data.sources import DatasetEntry, Source, find_sources, refuse_repeats
from strata.errors import ConfigError


@dataclass(frozen=True)
class InputOptions:
    """What of a data set is read, and how.

    Attributes:
        config: the configuration of a data set whose SOURCE names none.
        split: of data sets among the sources.
        val_split: of data sets among the sources of val.
        streaming: read files of the hub where they are, instead of fetching them.
    """

    config: str | None = None
    split: str = "train"
    val_split: str = "validation"
    streaming: bool = False


@dataclass(frozen=True)
class Inputs:
    """All files to read, in order.

    Attributes:
        files: those of the sources, then those of val.
        num_train: how many of them, from the first, are not of val.
        datasets: which of them belong to data sets.
        folders: the local paths among the SOURCEs.
        fresh: the first file of each data set that was looked up now, and not in a manifest.
    """

    files: list[Source]
    num_train: int
    datasets: tuple[DatasetEntry, ...]
    folders: tuple[Path, ...]
    fresh: tuple[Source, ...]


def find_inputs(
    sources: Sequence[str | Path],
    val_sources: Sequence[str | Path],
    *,
    options: InputOptions,
    recorded: PreparedFrom | None,
) -> Inputs:
    """Find the files behind all SOURCEs.

    A data set of the hub that `recorded` knows is the files that stand there: a run that goes on
    reads what it began with, whatever its branch has become, and asks the hub nothing.

    Args:
        sources: paths and names of data sets.
        val_sources: those whose documents all go to val.
        options: what of data sets is read.
        recorded: what an earlier call on the same folder read.

    Raises:
        DataError: a source is missing, of another kind, or there twice.
        ConfigError: an option for data sets was given, and there is none.
        HubError: the hub cannot be reached, or does not have a data set.
    """
    files: list[Source] = []
    datasets: list[DatasetEntry] = []
    folders: list[Path] = []
    fresh: list[Source] = []
    num_train = 0
    for is_val, group in enumerate((sources, val_sources)):
        split = options.val_split if is_val else options.split
        for given in group:
            named = parse_source(given, config=options.config, split=split)
            if isinstance(named, Path):
                folders.append(named)
                files += find_sources([named])
                continue
            if named.folder is not None:
                folders.append(named.folder)
            known = _recorded(named, recorded)
            if known is not None:
                entry = known.model_copy(update={"first": len(files)})
                found = _again(known, recorded, streaming=options.streaming)
            else:
                entry, found = find_dataset(named, first=len(files), streaming=options.streaming)
                fresh.append(found[0])
            datasets.append(entry)
            files += found
        if not is_val:
            num_train = len(files)
    if not files:
        find_sources([])  # says what a source is
    if not datasets and options != InputOptions():
        raise ConfigError(
            "--config, --split, --val-split and --streaming are for data sets, and no SOURCE is "
            "one: name owner/name[:config][@revision], or a folder whose README.md has configs"
        )
    refuse_repeats(files)
    return Inputs(files, num_train, tuple(datasets), tuple(folders), tuple(fresh))


def check_columns(inputs: Inputs, *, options: ReadOptions) -> None:
    """Read the first document of each data set that was just found, before hours are spent.

    Raises:
        DataError: it has no text where one was looked for; the line names the columns there are.
    """
    for source in inputs.fresh:
        next(read_documents(source.peek(), options=options), None)


def _recorded(name: DatasetName, recorded: PreparedFrom | None) -> DatasetEntry | None:
    if recorded is None or name.folder is not None:
        return None
    for entry in recorded.datasets:
        same_name = (entry.name, entry.split) == (name.repo, name.split)
        same_commit = name.revision == entry.revision and name.config in (None, entry.config)
        if same_name and not entry.is_mirror and (entry.asked == str(name) or same_commit):
            return entry
    return None


def _again(entry: DatasetEntry, recorded: PreparedFrom | None, *, streaming: bool) -> list[Source]:
    assert recorded is not None and entry.revision is not None
    files = (*recorded.sources, *recorded.val_sources)
    own = files[entry.first : entry.first + entry.num_files]
    return remote_sources(entry.name, entry.revision, list(own), streaming=streaming)
