"""Rows of fine-tuning: read, checked and brought to one form before anything is trained.

{"prompt": ..., "completion": ...}                 text, or lists of messages
{"messages": [...]}                                the last one, an answer, is the completion
{"prompt": ..., "chosen": ..., "rejected": ...}    preferences, text or messages
beside each of them: "references": texts, or {"id": ...} of a bank
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from strata.data.order import content_fraction
from strata.data.readers import read_rows
from strata.data.sources import find_sources
from strata.errors import DataError
from strata.explicit.bank import Bank
from strata.explicit.cut import cut
from strata.explicit.documents import Document
from strata.explicit.settings import ExplicitMemoryConfig
from strata.train.tune.recipe import PairsConfig

Kind = Literal["sft", "dpo"]
Message = dict[str, str]
Text = str | list[Message]

ROLES = ("system", "user", "assistant")
_ANSWERS: dict[Kind, tuple[str, ...]] = {"sft": ("completion",), "dpo": ("chosen", "rejected")}
_FORMS: dict[Kind, str] = {
    "sft": "'prompt' and 'completion', or 'messages'",
    "dpo": "'prompt', 'chosen' and 'rejected'",
}


@dataclass(frozen=True)
class Row:
    """One row.

    Attributes:
        where: file and line, for messages.
        fields: prompt and completion, or prompt, chosen and rejected; all text or all messages.
        references: texts, or ids of a bank behind `BankId`; None where the row names none.
    """

    where: str
    fields: dict[str, Text]
    references: tuple[str | BankId, ...] | None

    @property
    def conversational(self) -> bool:
        """Whether it is made of messages, which a chat template turns into text."""
        return not isinstance(self.fields["prompt"], str)


@dataclass(frozen=True)
class BankId:
    """A reference of a bank, by its id."""

    id: str


@dataclass(frozen=True)
class Split:
    """The rows of a run.

    Attributes:
        train: at least one.
        validation: none where the recipe holds none out.
        fingerprints: of every file read, by name: of its size and both its ends.
    """

    train: list[Row]
    validation: list[Row]
    fingerprints: dict[str, str]


def read_split(data: PairsConfig, kind: Kind, *, seed: int) -> Split:
    """Read and check all rows.

    Raises:
        DataError: a file cannot be read, holds no row, or a row is not of the form needed.
    """
    prints: dict[str, str] = {}
    train = _read(data.train, kind, data, prints)
    validation: list[Row] = []
    if data.validation is not None:
        validation = _read(data.validation, kind, data, prints)
    elif data.validation_fraction:
        held = [
            content_fraction(repr(row.fields).encode(), seed=seed, purpose="tune validation")
            < data.validation_fraction
            for row in train
        ]
        validation = [row for row, out in zip(train, held, strict=True) if out]
        train = [row for row, out in zip(train, held, strict=True) if not out]
        if not train or not validation:
            raise DataError(
                f"data.validation_fraction {data.validation_fraction} of {len(held)} rows leaves "
                f"{len(train)} to train on and {len(validation)} to validate: give more rows or "
                "another fraction"
            )
    forms = {row.conversational for row in (*train, *validation)}
    if len(forms) > 1:
        odd = next(row for row in (*train, *validation) if not row.conversational)
        raise DataError(
            f"{odd.where} is plain text and other rows are messages: give one form throughout"
        )
    return Split(train, validation, prints)


def _read(path: Path, kind: Kind, data: PairsConfig, prints: dict[str, str]) -> list[Row]:
    rows: list[Row] = []
    for source in find_sources([path]):
        prints[source.entry.name] = f"{source.entry.num_bytes}:{source.entry.fingerprint}"
        for where, fields in read_rows(source):
            rows += _parse(where, fields, kind, every=data.turns == "every")
    if not rows:
        raise DataError(f"{path} holds no row: give rows with {_FORMS[kind]}")
    return rows


def _parse(where: str, given: Mapping[str, Any], kind: Kind, *, every: bool) -> Iterator[Row]:
    references = _references(where, given.get("references"))
    if kind == "sft" and given.get("messages") is not None:
        messages = _messages(where, "messages", given["messages"])
        if messages[-1]["role"] != "assistant":
            raise DataError(f"{where}: the last of 'messages' must be the assistant's answer")
        answers = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
        for at in answers if every else answers[-1:]:
            if at == 0:
                raise DataError(f"{where}: an answer stands first in 'messages', behind no prompt")
            yield Row(where, {"prompt": messages[:at], "completion": [messages[at]]}, references)
        return
    names = ("prompt", *_ANSWERS[kind])
    missing = [name for name in names if given.get(name) is None]
    if missing:
        has = ", ".join(repr(str(name)[:40]) for name in list(given)[:20]) or "nothing"
        raise DataError(
            f"{where}: no {missing[0]!r}; a row needs {_FORMS[kind]}, this one has {has}"
        )
    fields = {name: _text(where, name, given[name]) for name in names}
    if len({isinstance(value, str) for value in fields.values()}) > 1:
        raise DataError(f"{where}: {', '.join(names)} must all be text, or all be messages")
    for name in names[1:]:
        value = fields[name]
        if not isinstance(value, str) and [m["role"] for m in value] != ["assistant"]:
            raise DataError(f"{where}: {name!r} must be one message of the assistant")
    if kind == "dpo" and fields["chosen"] == fields["rejected"]:
        raise DataError(f"{where}: 'chosen' and 'rejected' are the same: leave the row out")
    yield Row(where, fields, references)


def _text(where: str, name: str, value: Any) -> Text:
    if isinstance(value, str):
        _check_text(where, name, value)
        return value
    return _messages(where, name, value)


def _messages(where: str, name: str, value: Any) -> list[Message]:
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise DataError(f"{where}: {name!r} must be text or a list of messages")
    messages = []
    for message in value:
        if not isinstance(message, Mapping):
            raise DataError(f"{where}: {name!r} holds {type(message).__name__}, not a message")
        given = {key: what for key, what in message.items() if what is not None}
        if set(given) != {"role", "content"}:
            raise DataError(
                f"{where}: a message of {name!r} has the fields {', '.join(sorted(given)) or '-'}: "
                "it needs 'role' and 'content', and can have no other"
            )
        if given["role"] not in ROLES:
            raise DataError(
                f"{where}: no role {given['role']!r}: a message is of {', '.join(ROLES)}"
            )
        _check_text(where, name, given["content"])
        messages.append({"role": given["role"], "content": given["content"]})
    return messages


def _check_text(where: str, name: str, value: Any) -> None:
    if not isinstance(value, str) or not value.strip():
        raise DataError(f"{where}: {name!r} holds no text")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{where}: {name!r} holds half a surrogate pair") from None


def _references(where: str, value: Any) -> tuple[str | BankId, ...] | None:
    if value is None:
        return None
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, Sequence):
        raise DataError(f"{where}: 'references' must be a list of texts, or of {{'id': ...}}")
    found: list[str | BankId] = []
    for one in value:
        if isinstance(one, Mapping) and set(one) == {"id"} and isinstance(one["id"], str):
            found.append(BankId(one["id"]))
        elif isinstance(one, str):
            _check_text(where, "references", one)
            found.append(one)
        else:
            raise DataError(
                f"{where}: 'references' holds {type(one).__name__}: give texts, or {{'id': ...}} "
                "of a bank"
            )
    return tuple(found)


def reference_texts(
    rows: Sequence[Row],
    tokenizer: Any,
    memory: ExplicitMemoryConfig,
    *,
    bank: Bank | None,
    max_references: int,
    progress: Callable[[int], None] | None = None,
) -> list[list[str] | None]:
    """The references of each row as texts that fit, cut as a bank would cut them.

    Args:
        rows: of the run.
        tokenizer: of the model.
        memory: says how long a reference may be.
        bank: whose ids rows may name.
        max_references: of one row.
        progress: told of the rows done.

    Returns:
        None for a row that names none, so that they may be found.

    Raises:
        DataError: ids without a bank, an id that it does not have, or too many references.
    """
    pieces: dict[str, list[str]] = {}
    named = _of_bank(rows, bank)
    out: list[list[str] | None] = []
    for number, row in enumerate(rows):
        if row.references is None:
            out.append(None)
        else:
            texts: dict[str, None] = {}  # equal texts are one memory
            for one in row.references:
                text = named[one.id] if isinstance(one, BankId) else one
                if text not in pieces:
                    document = Document(text, row.where)
                    pieces[text] = [part.text for part in cut(document, tokenizer, memory)]
                texts.update(dict.fromkeys(pieces[text]))
            if len(texts) > max_references:
                raise DataError(
                    f"{row.where}: {len(texts)} references of at most {memory.reference_tokens} "
                    f"tokens, above reading.max_references {max_references}: raise it, or name less"
                )
            out.append(list(texts))
        if progress is not None:
            progress(number + 1)
    return out


def _of_bank(rows: Sequence[Row], bank: Bank | None) -> dict[str, str]:
    first: dict[str, str] = {}
    for row in rows:
        for one in row.references or ():
            if isinstance(one, BankId):
                first.setdefault(one.id, row.where)
    if not first:
        return {}
    if bank is None:
        where = next(iter(first.values()))
        raise DataError(f"{where} names references by id: give the bank, reading.bank=PATH")
    return {record.id: record.text for record in bank.take(list(first))}
