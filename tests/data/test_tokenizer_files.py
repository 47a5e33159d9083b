"""Files of tiktoken and sentencepiece become folders whose ids are those of their own libraries."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_documents import Prepare, make_texts, write_jsonl
from tokenizers import Tokenizer
from transformers import AutoTokenizer

from strata.data.convert_tokenizer import convert_tokenizer
from strata.data.dataset import TokenDataset
from strata.data.prepare import PrepareConfig, prepare
from strata.data.tiktoken_file import _llama3_special_tokens
from strata.errors import DataError

SAMPLES = (
    *make_texts(8),
    *(
        "",
        " ",
        "  two  spaces \n\n and\tmore ",
        "Don't 12345 x_y",
        "naïve 日本語 🙂",
        "the<s>end</s>",
    ),
    "the river the river",
)
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MERGED = (b"th", b"the", b" t", b" the", b"er", b"iv", b"river", b" r", b"\xe6\x97", b"  ")
RANKS = {bytes([value]): value for value in range(256)}
RANKS |= {token: 256 + number for number, token in enumerate(MERGED)}


def write_ranks(path: Path, ranks: dict[bytes, int] = RANKS) -> Path:
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    path.write_text("".join(lines))
    return path


def load(folder: Path) -> Tokenizer:
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def ids(tokenizer: Tokenizer, text: str) -> list[int]:
    tokenizer.encode_special_tokens = True  # as prepare does: a text has no special tokens
    return tokenizer.encode(text, add_special_tokens=False).ids


# tiktoken


def test_a_tiktoken_file(tmp_path: Path) -> None:
    path = write_ranks(tmp_path / "a.tiktoken")
    size = convert_tokenizer(path, out=tmp_path / "a", bos="<b>", eos="<e>", pad="<p>")
    tokenizer = load(tmp_path / "a")
    assert size == len(RANKS) + 3
    assert [tokenizer.token_to_id(t) for t in ("<b>", "<e>", "<p>")] == [266, 267, 268]
    assert ids(tokenizer, " the river") == [
        RANKS[b" the"],
        RANKS[b" r"],
        RANKS[b"iv"],
        RANKS[b"er"],
    ]
    # A word that is a token itself is that token, although merges lead past it.
    assert ids(tokenizer, "river") == [RANKS[b"river"]]
    for text in SAMPLES:
        assert tokenizer.decode(ids(tokenizer, text), skip_special_tokens=False) == text
    auto = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert (auto.bos_token_id, auto.eos_token_id, auto.pad_token_id) == (266, 267, 268)
    assert auto("river")["input_ids"] == [RANKS[b"river"]]


def test_tiktoken_itself_gives_the_same_ids(tmp_path: Path) -> None:
    tiktoken = pytest.importorskip("tiktoken")
    path = write_ranks(tmp_path / "a.tiktoken")
    convert_tokenizer(path, out=tmp_path / "a", eos="<e>")
    theirs = tiktoken.Encoding("a", pat_str=PATTERN, mergeable_ranks=RANKS, special_tokens={})
    tokenizer = load(tmp_path / "a")
    for text in SAMPLES:
        assert ids(tokenizer, text) == theirs.encode_ordinary(text), text


def test_llama_3_is_known_by_its_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("strata.data.tiktoken_file._LLAMA3_RANKS", len(RANKS))
    path = write_ranks(tmp_path / "tokenizer.model")
    assert convert_tokenizer(path, out=tmp_path / "a") == len(RANKS) + 256
    tokenizer, first = load(tmp_path / "a"), len(RANKS)
    special = {number: tokenizer.id_to_token(first + number) for number in (0, 1, 2, 5, 6, 7, 8, 9)}
    assert special == {
        0: "<|begin_of_text|>",
        1: "<|end_of_text|>",
        2: "<|reserved_special_token_0|>",
        5: "<|reserved_special_token_3|>",
        6: "<|start_header_id|>",
        7: "<|end_header_id|>",
        8: "<|reserved_special_token_4|>",
        9: "<|eot_id|>",
    }
    assert tokenizer.id_to_token(first + 255) == "<|reserved_special_token_250|>"
    assert len(set(_llama3_special_tokens())) == 256
    auto = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert (auto.bos_token_id, auto.eos_token_id) == (first, first + 1)
    assert auto("river")["input_ids"] == [first, RANKS[b"river"]]
    convert_tokenizer(path, out=tmp_path / "b", add_bos=False)
    assert load(tmp_path / "b").encode("river").ids == [RANKS[b"river"]]


# sentencepiece


def make_proto(kind: str, **settings: Any) -> Any:
    """A model of a few pieces with bytes for what is unknown; settings of its normaliser."""
    from transformers.convert_slow_tokenizer import import_protobuf

    messages = import_protobuf()
    proto = messages.ModelProto()
    words = ["▁the", "▁river", "▁runs", "▁to", "▁sea", "▁hill", "▁▁", "▁", "th", "the", "ri"]
    words += ["riv", "er", "river", "▁t", "▁th", "run", "runs"]
    words += [*sorted(set("".join(make_texts(40))) - {" "}), "v", "x", "D", "'", "ru"]
    pieces = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
    pieces += [(f"<0x{value:02X}>", 6) for value in range(256)]
    pieces += [(word, 1) for word in dict.fromkeys(words)]
    for number, (piece, kind_of_piece) in enumerate(pieces):
        score = -float(number - 258) * (1.0 if kind == "bpe" else 0.1)
        score = score if kind_of_piece == 1 else 0.0
        proto.pieces.add(piece=piece, score=score, type=kind_of_piece)
    trainer = proto.trainer_spec
    trainer.model_type = 2 if kind == "bpe" else 1
    trainer.byte_fallback, trainer.vocab_size = True, len(pieces)
    trainer.unk_id, trainer.bos_id, trainer.eos_id, trainer.pad_id = 0, 1, 2, -1
    normalizer = proto.normalizer_spec
    normalizer.name = "identity"
    normalizer.add_dummy_prefix, normalizer.remove_extra_whitespaces = True, False
    for name, value in settings.items():
        setattr(normalizer, name, value)
    return proto


@pytest.fixture
def model(tmp_path: Path) -> Callable[..., Path]:
    def write(kind: str, **settings: Any) -> Path:
        path = tmp_path / f"{kind}{len(list(tmp_path.iterdir()))}.model"
        path.write_bytes(make_proto(kind, **settings).SerializeToString())
        return path

    return write


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model(tmp_path: Path, model: Callable[..., Path], kind: str) -> None:
    path = model(kind)
    size = convert_tokenizer(path, out=tmp_path / "a", add_bos=True)
    proto = make_proto(kind)
    assert size == len(proto.pieces)
    tokenizer = load(tmp_path / "a")
    pieces = [proto.pieces[number].piece for number in ids(tokenizer, "the river runs é")]
    assert pieces == ["▁the", "▁river", "▁runs", "▁", "<0xC3>", "<0xA9>"]
    auto = AutoTokenizer.from_pretrained(tmp_path / "a")
    assert (auto.bos_token_id, auto.eos_token_id, auto.unk_token_id) == (1, 2, 0)
    assert auto("the")["input_ids"][0] == 1
    for text in SAMPLES:
        decoded = tokenizer.decode(ids(tokenizer, text), skip_special_tokens=False)
        assert decoded == text


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"add_dummy_prefix": False},
        {"remove_extra_whitespaces": True},
        {"add_dummy_prefix": False, "remove_extra_whitespaces": True},
    ],
)
def test_sentencepiece_itself_gives_the_same_ids(
    tmp_path: Path, model: Callable[..., Path], kind: str, settings: dict[str, bool]
) -> None:
    sentencepiece = pytest.importorskip("sentencepiece")
    path = model(kind, **settings)
    convert_tokenizer(path, out=tmp_path / "a")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load(tmp_path / "a")
    for text in SAMPLES:
        assert ids(tokenizer, text) == theirs.encode(text), text


def test_pieces_that_go_on_behind_a_space(tmp_path: Path) -> None:
    """Words cannot be looked up one by one then, and are not."""
    sentencepiece = pytest.importorskip("sentencepiece")
    proto = make_proto("unigram")
    proto.pieces.add(piece="▁the▁river", score=-0.01, type=1)
    proto.trainer_spec.vocab_size += 1
    path = tmp_path / "a.model"
    path.write_bytes(proto.SerializeToString())
    convert_tokenizer(path, out=tmp_path / "a")
    tokenizer = load(tmp_path / "a")
    assert ids(tokenizer, "the river") == [len(proto.pieces) - 1]
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(path))
    for text in SAMPLES:
        assert ids(tokenizer, text) == theirs.encode(text), text


# Where they are used, and refused


def test_prepare_takes_the_file_itself(
    tmp_path: Path, prepare_to: Prepare, model: Callable[..., Path]
) -> None:
    texts = make_texts(30)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    path = model("bpe")
    convert_tokenizer(path, out=tmp_path / "folder")
    for name, tokenizer in (("file", path), ("out", tmp_path / "folder")):
        prepare(
            [source],
            out=tmp_path / f"tokens-{name}",
            tokenizer=tokenizer,
            config=PrepareConfig(shuffle=False),
        )
    one, other = (
        {p.relative_to(f): p.read_bytes() for p in f.rglob("*") if p.is_file()}
        for f in (tmp_path / "tokens-file", tmp_path / "tokens-out")
    )
    assert one == other
    document = TokenDataset.open(tmp_path / "tokens-file").document(3)
    assert load(tmp_path / "folder").decode(document.tolist()) == texts[3]
    ranks = write_ranks(tmp_path / "a.tiktoken")
    with pytest.raises(DataError, match=r"names no token that ends a document: .* --eos TOKEN"):
        prepare([source], out=tmp_path / "x", tokenizer=ranks, config=PrepareConfig())
    with pytest.raises(DataError, match="give the folder that it lies in"):
        prepare(
            [source],
            out=tmp_path / "x",
            tokenizer=tmp_path / "folder" / "tokenizer.json",
            config=PrepareConfig(),
        )


def test_files_that_are_refused(
    tmp_path: Path,
    run: Callable[..., tuple[int, str, str]],
    model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(path: Path, *arguments: object) -> str:
        code, out, error = run("tokenizer", "convert", path, "--out", tmp_path / "made", *arguments)
        assert (code, out) == (2, "") and error.count("\n") == 1
        assert not list(tmp_path.glob("*made*"))
        return error

    assert "no tokenizer at" in refused(tmp_path / "none.model")
    path = tmp_path / "a.model"
    for content, message in (
        (b"", "it holds no pieces"),
        (b"\xff\xff\xff\xff", "neither a tiktoken file nor a sentencepiece model"),
        (b"AA== 0\nBB\n", "line 2: not base64, a space and a number"),
        (b"AA== 0\nAA== 1\n", "line 2: rank 1 where 1 was expected"),
        (b"AA== 0\nAQ== 2\n", "line 2: rank 2 where 1 was expected"),
        (b"AA== 0\nAQ== 1\n", "lacks 254 of the 256 bytes"),
    ):
        path.write_bytes(content)
        assert message in refused(path)
    write_ranks(path)
    assert "names no bos token to begin texts with: give one with --bos" in refused(
        path, "--add-bos"
    )
    spm = model("bpe")
    assert "has no piece '<x>' to be the eos_token" in refused(spm, "--eos", "<x>")
    proto = make_proto("bpe")
    proto.trainer_spec.model_type = 3
    path.write_bytes(proto.SerializeToString())
    assert "is neither unigram nor BPE: strata does not convert such models" in refused(path)
    monkeypatch.setattr("strata.data.tiktoken_file.MAX_FILE_BYTES", 100)
    assert "is larger than" in refused(write_ranks(tmp_path / "b.tiktoken"))
    (tmp_path / "there").mkdir()
    code, _, error = run("tokenizer", "convert", spm, "--out", tmp_path / "there")
    assert code == 2 and "exists: give another --out" in error


def test_the_command_line_converts(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], model: Callable[..., Path]
) -> None:
    arguments = ("tokenizer", "convert", model("unigram"), "--out", tmp_path / "a")
    code, printed, _ = run(*arguments, "--json")
    assert code == 0
    assert json.loads(printed) == {
        "out": str(tmp_path / "a"),
        "vocab_size": len(make_proto("unigram").pieces),
    }
