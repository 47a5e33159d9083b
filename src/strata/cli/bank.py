"""`strata bank`: documents as memories of one model, in a folder."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strata.errors import ConfigError

if TYPE_CHECKING:
    from strata.explicit.bank import AddReport
    from strata.explicit.bank.partition import WorkerMeans
    from strata.explicit.bank.settings import BankSettings
    from strata.explicit.encode import Encoder
    from strata.explicit.fingerprint import Fingerprint
    from strata.explicit.settings import ExplicitMemoryConfig

Folder = Annotated[
    str,  # a path would lose one of a URL's slashes
    typer.Argument(help="the bank's folder, or its URL: s3://bucket/bank", metavar="BANK"),
]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]
ModelOption = Annotated[Path, typer.Option("--model", help="folder written by save_pretrained")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu or cuda")]


def create(
    bank: Folder,
    model: ModelOption,
    embedder: Annotated[
        str, typer.Option(help="minilm (offline), a name on the hub, a folder; none: by words only")
    ] = "minilm",
    codec: Annotated[
        str, typer.Option(help="bf16, int8, int4, faiss, or a FAISS factory string")
    ] = "bf16",
    selector: Annotated[
        str,
        typer.Option(
            help="which tokens are kept: attention, expected, key_norm, reconstruction, all"
        ),
    ] = "attention",
    tokens: Annotated[int, typer.Option(help="tokens that each head keeps")] = 8,
    reference_tokens: Annotated[int, typer.Option(help="longest reference")] = 128,
    overlap_tokens: Annotated[int, typer.Option(help="repeated of the reference before")] = 0,
    layers: Annotated[
        str | None, typer.Option(help="memory layers, as 0,1,2; default: the first half")
    ] = None,
    marker: Annotated[
        str | None, typer.Option(help="text before each reference; default: the paper's")
    ] = None,
    positions: Annotated[
        str, typer.Option(help="parallel or sequential: where memories stand when they are read")
    ] = "parallel",
    device: DeviceOption = "auto",
) -> None:
    """Make an empty bank that belongs to one model."""
    from strata.config import validate
    from strata.explicit.bank import Bank
    from strata.explicit.embed import make_embedder
    from strata.explicit.settings import ExplicitMemoryConfig

    tree = {
        "layers": None if layers is None else _numbers(layers),
        "tokens_per_head": tokens,
        "selector": selector,
        "codec": codec,
        "reference_tokens": reference_tokens,
        "overlap_tokens": overlap_tokens,
        "positions": positions,
    } | ({} if marker is None else {"marker": marker})
    config = validate(ExplicitMemoryConfig, tree, origin="the bank's settings")
    opened = _open_model(model, config, device)
    encoder, fingerprint = opened.encoder, opened.fingerprint
    made = Bank.create(
        bank,
        config=config,
        embedder=None if embedder == "none" else make_embedder(embedder, device=device),
        shape=encoder.shape,
        fingerprint=fingerprint,
    )
    shape, codec_ = encoder.shape, made.codec
    assert codec_ is not None
    print(
        f"{bank}: empty, for {fingerprint.architecture} of {model}; {len(shape.layers)} memory "
        f"layers, {len(shape.heads)} memory heads, {shape.tokens} tokens a head, "
        f"{codec_.bytes_per_memory / 1024:,.1f} KiB a memory ({config.codec})"
    )


def add(
    bank: Folder,
    paths: Annotated[list[Path], typer.Argument(help="files and folders", metavar="PATH...")],
    model: ModelOption,
    cold: Annotated[
        bool, typer.Option("--cold", help="store text only; encode at first use")
    ] = False,
    text_field: Annotated[str, typer.Option(help="of a row of jsonl and parquet")] = "text",
    id_field: Annotated[str | None, typer.Option(help="field that names a row's source")] = None,
    batch_size: Annotated[int, typer.Option(help="references encoded at once")] = 32,
    engine: Annotated[
        str, typer.Option(help="local, or ray: several processes, on one or many machines")
    ] = "local",
    num_workers: Annotated[int | None, typer.Option(help="processes of the engine ray")] = None,
    device: DeviceOption = "auto",
    as_json: AsJson = False,
) -> None:
    """Add documents: txt, md, html, jsonl, parquet, pdf, docx. Run again, it goes on.

    What is there is skipped, what changed is replaced, and every commit holds whole documents.
    """
    from rich.console import Console

    from strata.explicit.bank import Bank
    from strata.explicit.cut import cut
    from strata.explicit.documents import ReadReport, read_documents

    _check_engine(engine, num_workers)
    opened = Bank.open(bank)
    config = opened.settings.config
    host = _open_model(model, config, device)
    encoder = host.encoder
    opened.check(host.fingerprint)
    read = ReadReport()

    def documents() -> Any:
        return read_documents(paths, text_field=text_field, id_field=id_field, report=read)

    def cut_it(document: Any) -> Any:
        return cut(document, host.tokenizer, config)

    documents()  # a path that is missing is said before anything is trained or written
    shown = Console(stderr=True)
    with shown.status("reading") as status:
        if opened.codec is not None and not opened.codec.trained and not cold:
            status.update("training the codec on a sample")
            opened.train(documents(), cut=cut_it, encoder=encoder)
            read.skipped.clear()

        def say(so_far: AddReport) -> None:
            status.update(f"{so_far.documents:,} documents, {so_far.references:,} references")

        if num_workers is not None:
            report = opened.add_with_ray(
                documents(),
                open_means=partial(_worker_means, model.resolve(), cold, device),
                num_workers=num_workers,
                device=device,
                batch_size=batch_size,
                on_progress=say,
            )
        else:
            report = opened.add(
                documents(),
                cut=cut_it,
                encoder=None if cold else encoder,
                embedder=_embedder(opened.embedder_name, device),
                batch_size=batch_size,
                on_progress=say,
            )
    for skipped in read.skipped:
        print(f"skipped {skipped.path}: {skipped.reason}", file=sys.stderr)
    if as_json:
        print(json.dumps(asdict(report)))
        return
    same = f", {report.unchanged:,} there already" if report.unchanged else ""
    twice = f", {report.num_duplicates:,} duplicates left out" if report.num_duplicates else ""
    empty = f", {report.empty:,} empty" if report.empty else ""
    print(
        f"{bank}: {report.documents:,} documents as {report.references:,} references"
        f"{' (cold)' if cold else ''}, {report.replaced:,} of them changed{same}{twice}{empty}"
    )


def rm(
    bank: Folder,
    sources: Annotated[list[str], typer.Argument(help="as `ls` shows them", metavar="SOURCE...")],
) -> None:
    """Take sources out. Their text stays on the disk until `compact --purge`."""
    from strata.explicit.bank import Bank

    print(f"{bank}: {Bank.open(bank).remove(sources):,} references removed")


def ls(bank: Folder, as_json: AsJson = False) -> None:
    """List the sources."""
    from strata.explicit.bank import Bank

    sources = Bank.open(bank).ls()
    if as_json:
        print(json.dumps([asdict(source) for source in sources]))
        return
    _table(
        ("references", "cold", "source"),
        [(f"{s.references:,}", f"{s.cold:,}" if s.cold else "", s.source) for s in sources],
    )


def show(
    bank: Folder,
    record: Annotated[str, typer.Argument(help="its id, or how it begins", metavar="ID")],
    as_json: AsJson = False,
) -> None:
    """Show one reference."""
    from strata.explicit.bank import Bank

    found = Bank.open(bank).show(record)
    tree = asdict(found) | {
        "vector": None if found.vector is None else found.vector.tolist(),
        "codes": None if found.codes is None else len(found.codes),
    }
    if as_json:
        print(json.dumps(tree, default=dict))
        return
    print(f"{found.id}  {found.source}:{found.start}-{found.end}")
    print(f"memory: {'cold' if found.codes is None else f'{len(found.codes):,} bytes'}")
    for name, value in found.metadata.items():
        print(f"{name}: {value}")
    print(f"\n{found.text}")


def search(
    bank: Folder,
    query: str,
    top_k: Annotated[int, typer.Option(help="hits")] = 5,
    by: Annotated[
        str | None, typer.Option(help="vector, text, hybrid, or queries (needs --model)")
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="the bank's model, whose own queries are searched with")
    ] = None,
    where: Annotated[
        list[str] | None, typer.Option(help="key=value that a hit's metadata must have")
    ] = None,
    device: DeviceOption = "auto",
    as_json: AsJson = False,
) -> None:
    """Find references; hybrid where the bank holds vectors, else by words."""
    from strata.explicit.bank import Bank
    from strata.explicit.source import open_retriever

    if not query.strip():
        raise ConfigError("the query is empty: give some words")
    kind: Any = by  # checked there
    opened, encoder = Bank.open(bank), None
    if by == "queries":
        if model is None:
            raise ConfigError("--by queries needs --model: the bank's own model makes the queries")
        given = _open_model(model, opened.settings.config, device)
        opened.check(given.fingerprint)
        encoder = given.encoder
    retriever = open_retriever(
        opened, kind, where=conditions(where), device=device, encoder=encoder
    )
    hits = retriever.search([query], top_k)[0]
    if as_json:
        print(json.dumps([asdict(hit) for hit in hits], default=dict))
        return
    if not hits:
        print("nothing found", file=sys.stderr)
    for hit in hits:
        print(f"{hit.score:.3f}  {hit.id[:8]}  {hit.source}:{hit.start}-{hit.end}")
        print(f"       {' '.join(hit.text.split())[:160]}")


def stats(bank: Folder, as_json: AsJson = False) -> None:
    """The bank in numbers."""
    from strata.explicit.bank import Bank

    opened = Bank.open(bank)
    found, given = opened.stats(), opened.settings
    tree = asdict(found) | {
        "model": None if given.fingerprint is None else given.fingerprint.architecture,
        "codec": given.config.codec,
        "embedder": None if given.embedder is None else given.embedder.name,
    }
    if as_json:
        print(json.dumps(tree))
        return
    for name, value in tree.items():
        print(f"{name.replace('_', ' ')}: {f'{value:,}' if isinstance(value, int) else value}")


def verify(bank: Folder, as_json: AsJson = False) -> None:
    """Read everything once and say what is broken; exit code 1 if anything is."""
    from strata.explicit.bank import Bank

    report = Bank.open(bank).verify()
    if as_json:
        print(json.dumps(asdict(report)))
    else:
        for fault in report.faults:
            print(fault)
        print(f"{report.records:,} references in {report.files:,} files: ", end="")
        print(f"{len(report.faults):,} faults" if report.faults else "all is well")
    if report.faults:
        raise typer.Exit(1)


def versions(bank: Folder, as_json: AsJson = False) -> None:
    """List the versions that can still be opened."""
    from strata.explicit.bank import Bank

    found = Bank.open(bank).versions()
    if as_json:
        print(json.dumps([asdict(version) for version in found]))
        return
    rows = [
        (str(v.version), f"{v.rows:,}", f"{datetime.fromtimestamp(v.at_s):%Y-%m-%d %H:%M}", v.what)
        for v in found
    ]
    _table(("version", "references", "at", "what"), rows)


def compact(
    bank: Folder,
    purge: Annotated[
        bool, typer.Option("--purge", help="leave nothing of what was removed on the disk")
    ] = False,
) -> None:
    """Merge small files, index everything, give up versions older than an hour."""
    from strata.explicit.bank import Bank

    done = Bank.open(bank).compact(purge=purge)
    print(
        f"{bank}: {done.files_before:,} files are {done.files_after:,}, "
        f"{done.bytes_before / 2**20:,.1f} MiB are {done.bytes_after / 2**20:,.1f} MiB, "
        f"{done.versions_removed:,} old versions removed"
    )


def export(
    bank: Folder, out: Annotated[Path, typer.Argument(help="folder to make", metavar="OUT")]
) -> None:
    """Write the bank as plain files, parquet and JSON."""
    from strata.explicit.bank import Bank

    print(f"{out}: {Bank.open(bank).export(out):,} references")


def import_(
    source: Annotated[Path, typer.Argument(help="what `export` wrote", metavar="EXPORT")],
    bank: Folder,
) -> None:
    """Make a bank of an exported one."""
    from strata.explicit.bank import Bank

    print(f"{bank}: {len(Bank.import_(source, bank)):,} references")


def conditions(where: Sequence[str] | None) -> dict[str, Any] | None:
    """`key=value` options; a value that is JSON is a number or a truth value."""
    found: dict[str, Any] = {}
    for text in where or ():
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ConfigError(f"--where {text!r} is not key=value")
        try:
            parsed = json.loads(value)
        except ValueError:
            parsed = value
        found[key] = parsed if isinstance(parsed, bool | int | float) else value
    return found or None


def _check_engine(engine: str, num_workers: int | None) -> None:
    if engine not in ("local", "ray"):
        raise ConfigError(f"--engine {engine!r}: give local or ray")
    if engine == "local" and num_workers is not None:
        raise ConfigError("--num-workers is of --engine ray: give both or none")
    if engine == "ray" and (num_workers is None or num_workers < 1):
        raise ConfigError("--engine ray needs --num-workers: how many processes encode, 1 or more")


def _embedder(name: str | None, device: str) -> Any:
    from strata.explicit.embed import make_embedder

    if name is None:
        return None
    embedder = make_embedder(name, device=device)
    assert embedder.width  # opened now, not when the first question waits
    return embedder


def _worker_means(model: Path, cold: bool, device: str, given: BankSettings) -> WorkerMeans:
    """What a worker of Ray works with; runs there."""
    from strata.explicit.bank.partition import WorkerMeans
    from strata.explicit.cut import cut

    host = _open_model(model, given.config, device)
    embedder = _embedder(None if given.embedder is None else given.embedder.name, device)

    def cut_it(document: Any) -> Any:
        return cut(document, host.tokenizer, given.config)

    return WorkerMeans(cut_it, None if cold else host.encoder, embedder, host.fingerprint)


@dataclass(frozen=True)
class _Opened:
    tokenizer: Any
    encoder: Encoder
    fingerprint: Fingerprint


def _open_model(model: Path, config: ExplicitMemoryConfig, device: str) -> _Opened:
    from strata.cli.device import open_model
    from strata.explicit.encode import Encoder
    from strata.explicit.fingerprint import fingerprint
    from strata.explicit.host import Host

    opened, tokenizer = open_model(model, device=device)
    encoder = Encoder(Host(opened), tokenizer, config)
    return _Opened(tokenizer, encoder, fingerprint(opened, tokenizer, config, encoder.shape))


def _numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise ConfigError(f"--layers {text!r}: give numbers with commas, as 0,1,2") from None


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    for name in header:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*(Text(cell) for cell in row))
    Console().print(table)


VERBS: dict[str, Callable[..., None]] = {
    "create": create,
    "add": add,
    "rm": rm,
    "ls": ls,
    "show": show,
    "search": search,
    "stats": stats,
    "verify": verify,
    "versions": versions,
    "compact": compact,
    "export": export,
    "import": import_,
}
