"""`strata ask` and `strata chat`: answers from a bank, with their sources."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from strata.cli.bank import AsJson, DeviceOption, Folder, ModelOption, conditions
from strata.errors import BankError, ConfigError

if TYPE_CHECKING:
    from strata.explicit.ask import Answer
    from strata.explicit.source import BankSource

FormatOption = Annotated[
    str, typer.Option("--format", help="how knowledge comes in: none, text, dense, explicit")
]
TopK = Annotated[int, typer.Option(help="references (for each 64 tokens, but for text)")]
NewTokens = Annotated[int, typer.Option(help="longest answer, in tokens")]
By = Annotated[
    str | None, typer.Option(help="search by vector, text, hybrid or queries (the model's own)")
]
Where = Annotated[list[str] | None, typer.Option(help="key=value that metadata must have")]
MinScore = Annotated[float | None, typer.Option(help="leave out references that score less")]
PresetOption = Annotated[
    str, typer.Option(help="paper, or ape for models never trained with memory (needs dense)")
]


def ask(
    bank: Folder,
    question: str,
    model: ModelOption,
    format: FormatOption = "explicit",
    preset: PresetOption = "paper",
    top_k: TopK = 5,
    by: By = None,
    where: Where = None,
    min_score: MinScore = None,
    max_new_tokens: NewTokens = 64,
    device: DeviceOption = "auto",
    as_json: AsJson = False,
) -> None:
    """Answer one question; the answer goes to standard output, sources and times to stderr."""
    asker = _open(
        bank, model, format=format, preset=preset, top_k=top_k, by=by, where=where,
        min_score=min_score, max_new_tokens=max_new_tokens, device=device,
    )  # fmt: skip
    answer = asker(question, [], None if as_json else _write)
    asker.save()
    if as_json:
        print(json.dumps(asdict(answer) | {"tokens_per_s": answer.tokens_per_s}))
        return
    print(flush=True)
    _say(answer)


def chat(
    bank: Folder,
    model: ModelOption,
    format: FormatOption = "explicit",
    preset: PresetOption = "paper",
    top_k: TopK = 5,
    by: By = None,
    where: Where = None,
    min_score: MinScore = None,
    max_new_tokens: NewTokens = 64,
    device: DeviceOption = "auto",
) -> None:
    """Ask on and on, a line each; an empty line or the end of input ends it."""
    asker = _open(
        bank, model, format=format, preset=preset, top_k=top_k, by=by, where=where,
        min_score=min_score, max_new_tokens=max_new_tokens, device=device,
    )  # fmt: skip
    history: list[dict[str, str]] = []
    while question := _line():
        try:
            answer = asker(question, history, _write)
        except ConfigError as error:  # too long, say: the conversation goes on
            print(f"strata: error: {error}", file=sys.stderr)
            continue
        print(flush=True)
        _say(answer)
        history += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer.text},
        ]
    asker.save()


@dataclass(frozen=True)
class _Asker:
    """A model, a bank and how to ask them."""

    options: dict[str, Any]
    source: BankSource | None

    def __call__(
        self, question: str, history: list[dict[str, str]], on_text: Callable[[str], None] | None
    ) -> Answer:
        from strata.explicit.ask import ask as answer

        with warnings.catch_warnings():
            # Said below, with the sources.
            warnings.filterwarnings("ignore", message="no memory was injected")
            return answer(
                question, source=self.source, history=history, on_text=on_text, **self.options
            )

    def save(self) -> None:
        """Store memories that had to be encoded; that another process writes is no failure."""
        if self.source is None:
            return
        try:
            saved = self.source.save()
        except BankError as error:
            print(f"memories made now were not stored: {error}", file=sys.stderr)
        else:
            if saved:
                print(f"{saved} references were encoded and stored", file=sys.stderr)


def _open(
    bank: str,
    model: Path,
    *,
    format: str,
    preset: str,
    top_k: int,
    by: str | None,
    where: list[str] | None,
    min_score: float | None,
    max_new_tokens: int,
    device: str,
) -> _Asker:
    from strata.cli.device import open_model
    from strata.explicit.ask import FORMATS
    from strata.explicit.attach import presets
    from strata.explicit.bank import Bank
    from strata.explicit.encode import Encoder
    from strata.explicit.host import Host
    from strata.explicit.settings import ExplicitMemoryConfig
    from strata.explicit.source import BankSource, open_retriever

    if format not in FORMATS:
        raise ConfigError(f"--format {format!r}: give one of {', '.join(FORMATS)}")
    chosen = {"paper": presets.PAPER, "ape": presets.APE}.get(preset)
    if chosen is None:
        raise ConfigError(f"--preset {preset!r}: give paper or ape")
    if preset == "ape" and format != "dense":
        raise ConfigError("--preset ape reads all tokens of all layers: give --format dense")
    for name, number in (("--top-k", top_k), ("--max-new-tokens", max_new_tokens)):
        if number < 1:
            raise ConfigError(f"{name} {number}: give 1 or more")
    opened = Bank.open(bank)
    decoder, tokenizer = open_model(model, device=device)
    options: dict[str, Any] = {
        "model": decoder,
        "tokenizer": tokenizer,
        "format": format,
        "preset": chosen,
        "top_k": top_k,
        "min_score": min_score,
        "max_new_tokens": max_new_tokens,
    }
    if format == "none":
        return _Asker(options, None)
    kind: Any = by  # checked there
    encoder = None
    if by == "queries":
        encoder = opened.use(decoder, tokenizer).encoder
    retriever = open_retriever(
        opened, kind, where=conditions(where), device=device, encoder=encoder
    )
    if format == "text":
        return _Asker(options, BankSource(opened, retriever))
    if format == "explicit":
        return _Asker(options, BankSource.of(opened, decoder, tokenizer, retriever=retriever))
    host, config = Host(decoder), opened.settings.config
    layers = tuple(n for n in range(host.num_layers) if not host.is_sliding(n))
    dense = ExplicitMemoryConfig(
        layers=layers,
        selector="all",
        reference_tokens=config.reference_tokens,
        marker=config.marker,
        positions=config.positions,
    )
    encoder = Encoder(host, tokenizer, dense)
    return _Asker(options, BankSource(opened, retriever, encoder=encoder, from_text=True))


def _line() -> str:
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    return sys.stdin.readline().strip()


def _write(text: str) -> None:
    print(text, end="", flush=True)


def _say(answer: Answer) -> None:
    """Sources and times, to standard error; none is said aloud."""
    if answer.format != "none":
        seen: dict[str, Any] = {}
        for used in answer.used:
            seen.setdefault(used.id, used)
        what = "references" if answer.format == "text" else "memories"
        print(f"{answer.injected} {what} read, from {len(seen)} places:", file=sys.stderr)
        for used in seen.values():
            text = " ".join(used.text.split())[:80]
            print(
                f"  {used.score:.3f}  {used.source}:{used.start}-{used.end}  {text}",
                file=sys.stderr,
            )
    ms = answer.ms
    print(
        f"search {ms['search']:.0f} ms, load {ms['load']:.0f} ms, first token "
        f"{ms['first_token']:.0f} ms, {answer.new_tokens} tokens in {ms['total'] / 1e3:.2f} s "
        f"({answer.tokens_per_s:.1f} tokens/s)",
        file=sys.stderr,
    )
