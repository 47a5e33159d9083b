"""Tokenizers of sentencepiece: a protocol buffer with pieces, scores and how text is normalised."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

from strata.errors import DataError

MAX_FILE_BYTES = 64 * 2**20

_SPACE = "\u2581"  # what sentencepiece writes for a space
_UNIGRAM, _BPE = 1, 2  # kinds of models
_UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 2, 3, 4, 6  # kinds of pieces


def read_sentencepiece(
    path: Path, *, bos: str | None, eos: str | None, pad: str | None
) -> tuple[Tokenizer, dict[str, str]]:
    """Convert a sentencepiece model, unigram or BPE.

    The tokenizer does what the model's own settings say (dummy prefix, repeated spaces, normaliser,
    bytes for unknown characters); a family of models that overrides them in code has to come from
    the hub.

    Args:
        path: the file.
        bos, eos, pad: special tokens instead of those that the file names; they must be among its
            pieces.

    Returns:
        The tokenizer and its special tokens by their names.

    Raises:
        DataError: it is damaged, of a kind that tokenizers has no model for, or a special token is
            not in it.
    """
    proto = _parse(path)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    for refused, what in (
        (trainer.model_type not in (_UNIGRAM, _BPE), "is neither unigram nor BPE"),
        (trainer.treat_whitespace_as_suffix, "writes spaces behind words"),
        (not normalizer.escape_whitespaces, "leaves spaces as they are"),
    ):
        if refused:
            raise DataError(f"{path} {what}: strata does not convert such models")
    tokenizer = Tokenizer(_model(proto))
    tokenizer.normalizer = _normalizer(normalizer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(_borders(proto))
    tokenizer.decoder = _decoder(add_prefix=normalizer.add_dummy_prefix)
    tokenizer.add_tokens(
        [
            AddedToken(piece.piece, normalized=False, special=piece.type == _CONTROL)
            for piece in proto.pieces
            if piece.type in (_CONTROL, _USER_DEFINED)
        ]
    )
    return tokenizer, _special_tokens(path, proto, bos=bos, eos=eos, pad=pad)


def _parse(path: Path) -> Any:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise DataError(f"{path} is larger than {MAX_FILE_BYTES // 2**20} MiB: no tokenizer")
    from transformers.convert_slow_tokenizer import import_protobuf

    try:
        from google.protobuf.message import DecodeError

        messages = import_protobuf()
    except ImportError:
        raise DataError(
            f"{path} is a protocol buffer: install what reads them with "
            'pip install "strata-lm[hub]"'
        ) from None
    proto = messages.ModelProto()
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError:
        raise DataError(f"{path} is neither a tiktoken file nor a sentencepiece model") from None
    if not proto.pieces:
        raise DataError(f"{path} is damaged: it holds no pieces")
    return proto


def _model(proto: Any) -> models.Model:
    trainer = proto.trainer_spec
    scores = [(piece.piece, piece.score) for piece in proto.pieces]
    unknown = next((i for i, piece in enumerate(proto.pieces) if piece.type == _UNKNOWN), None)
    if trainer.model_type == _UNIGRAM:
        return models.Unigram(scores, unk_id=unknown, byte_fallback=trainer.byte_fallback)
    from transformers.convert_slow_tokenizer import generate_merges

    ids = {piece: number for number, (piece, _) in enumerate(scores)}
    not_merged = {p.piece for p in proto.pieces if p.type in (_UNKNOWN, _CONTROL, _BYTE)}
    return models.BPE(
        ids,
        generate_merges(ids, scores, skip_tokens=not_merged),
        unk_token=scores[unknown][0] if unknown is not None else None,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )


def _borders(proto: Any) -> list[pre_tokenizers.PreTokenizer]:
    """Where a text is cut before pieces are looked for."""
    borders: list[pre_tokenizers.PreTokenizer] = []
    if proto.trainer_spec.model_type == _UNIGRAM:
        # tokenizers looks for every piece in a text; sentencepiece leaves these out, so that a text
        # that mentions "</s>" does not end there. They are not found if their last letter is cut
        # off. (BPE has no merges that lead to them.)
        hidden = [
            f"{re.escape(piece.piece[:-1])}(?={re.escape(piece.piece[-1])})"
            for piece in proto.pieces
            if piece.type in (_UNKNOWN, _CONTROL, _BYTE) and len(piece.piece) > 1
        ]
        if hidden:
            pattern = Regex("|".join(hidden))
            borders.append(pre_tokenizers.Split(pattern, behavior="merged_with_previous"))
    if all(re.fullmatch(f"{_SPACE}*[^{_SPACE}]*", piece.piece) for piece in proto.pieces):
        # No piece goes on behind a space within it, so words can be looked up one by one.
        pattern = Regex(f"{_SPACE}*[^{_SPACE}]+|{_SPACE}+")
        borders.append(pre_tokenizers.Split(pattern, behavior="isolated"))
    return borders


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Replace(Regex(" {2,}"), " "), normalizers.Strip()]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(_SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", _SPACE)])


def _decoder(*, add_prefix: bool) -> decoders.Decoder:
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if add_prefix:
        steps.append(decoders.Strip(content=" ", left=1))
    return decoders.Sequence(steps)


def _special_tokens(
    path: Path, proto: Any, *, bos: str | None, eos: str | None, pad: str | None
) -> dict[str, str]:
    pieces = [piece.piece for piece in proto.pieces]
    trainer = proto.trainer_spec
    named = {}
    for name, given, number in (
        ("bos_token", bos, trainer.bos_id),
        ("eos_token", eos, trainer.eos_id),
        ("pad_token", pad, trainer.pad_id),
        ("unk_token", None, trainer.unk_id),
    ):
        if given is not None and given not in pieces:
            raise DataError(f"{path} has no piece {given!r} to be the {name}")
        if given is None and 0 <= number < len(pieces):
            given = pieces[number]
        if given is not None:
            named[name] = given
    return named
