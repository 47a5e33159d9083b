"""Damaged models, faulty question files and impossible options: one line each, no traceback."""

from __future__ import annotations

import errno
import gzip
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from strata.cli.main import main

Run = Callable[..., str]
QUESTION = '{"question": "which city?", "answers": ["Rome"]}\n'


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command that must fail, and give its one line."""

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["strata", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            main()
        captured = capsys.readouterr()
        assert caught.value.code not in (0, None), captured
        assert not captured.out
        assert "Traceback" not in captured.err
        lines = [line for line in captured.err.splitlines() if line.startswith("strata: error: ")]
        assert len(lines) == 1, captured.err
        return lines[0]

    return run


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text(QUESTION)
    return path


# Model folders


def no_folder(folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))


def a_file(folder: Path) -> None:
    no_folder(folder)
    folder.write_text("{}")


def empty_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def no_config(folder: Path) -> None:
    (folder / "config.json").unlink()


def cut_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(path.read_text()[:60])


def binary_config(folder: Path) -> None:
    (folder / "config.json").write_bytes(b"\xff\xfe\x00\x01")


def list_config(folder: Path) -> None:
    (folder / "config.json").write_text("[1, 2]")


def change_config(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def string_width(folder: Path) -> None:
    change_config(folder, hidden_size="wide")


def other_width(folder: Path) -> None:
    change_config(folder, hidden_size=48)


def negative_vocabulary(folder: Path) -> None:
    change_config(folder, vocab_size=-5)


def one_more_layer(folder: Path) -> None:
    change_config(folder, num_hidden_layers=3)


def unknown_type(folder: Path) -> None:
    change_config(folder, model_type="strata_nonesuch")


def vision_type(folder: Path) -> None:
    change_config(folder, model_type="vit", architectures=["ViTModel"])


def encoder_decoder_type(folder: Path) -> None:
    change_config(folder, model_type="t5", architectures=["T5ForConditionalGeneration"])


def no_weights(folder: Path) -> None:
    (folder / "model.safetensors").unlink()


def empty_weights(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def cut_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def cut_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20])


def flipped_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[12] ^= 0x5A
    path.write_bytes(content)


def huge_header(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(b"\xff" * 7 + b"\x7f" + path.read_bytes()[8:])


def no_tokenizer(folder: Path) -> None:
    for path in folder.glob("tokenizer*"):
        path.unlink()


def cut_tokenizer(folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text()[:400])


def hollow_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{}")


def larger_tokenizer(folder: Path) -> None:
    """A tokenizer of another model: its ids go beyond the embedding."""
    path = folder / "tokenizer.json"
    tree = json.loads(path.read_text())
    vocabulary = tree["model"]["vocab"]
    tree["model"]["vocab"] = {
        text: index if index < 2 else index + 5000 for text, index in vocabulary.items()
    }
    path.write_text(json.dumps(tree))


DAMAGES = [
    no_folder,
    a_file,
    empty_folder,
    no_config,
    cut_config,
    binary_config,
    list_config,
    string_width,
    other_width,
    negative_vocabulary,
    one_more_layer,
    unknown_type,
    vision_type,
    encoder_decoder_type,
    no_weights,
    empty_weights,
    cut_weights,
    cut_header,
    flipped_header,
    huge_header,
    no_tokenizer,
    cut_tokenizer,
    hollow_tokenizer,
    larger_tokenizer,
]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: getattr(damage, "__name__", None))
def test_damaged_model_folder(
    tiny_model: Path, refused: Run, questions: Path, damage: Callable[[Path], None]
) -> None:
    damage(tiny_model)
    line = refused("generate", tiny_model, "The capital")
    assert len(line) < 700
    assert refused("eval", tiny_model, "--recall", questions) != ""


@pytest.mark.parametrize(
    "memory_layers",
    [None, {}, [], "x", {"layers": [9]}, {"layers": [1], "top_k": 10**9}, {"unknown": 1}],
)
def test_damaged_memory_configuration(
    tiny_memory_model: Path, refused: Run, memory_layers: object
) -> None:
    change_config(tiny_memory_model, memory_layers=memory_layers)
    refused("generate", tiny_memory_model, "The capital")


def test_memory_weights_cut_off_the_file(tiny_memory_model: Path, refused: Run) -> None:
    from safetensors.torch import load_file, save_file

    path = tiny_memory_model / "model.safetensors"
    weights = {name: value for name, value in load_file(path).items() if ".1.mlp" not in name}
    save_file(weights, path, metadata={"format": "pt"})
    assert "weights" in refused("generate", tiny_memory_model, "The capital")


def test_model_path_that_is_hostile_text(refused: Run) -> None:
    for path in ("", "a" * 5000, "../" * 30 + "etc", "hub/model"):
        refused("generate", path, "The capital")


# Question files


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "holds no questions"),
        (b'{"answers": ["a"]}\n', "line 1: no 'question' or 'prompt' field"),
        (QUESTION.encode() + b'{"question": "a"}\n', "line 2: no 'answers' or 'answer' field"),
        (QUESTION.encode() * 2 + b'{"question": \n', "line 3 is not JSON"),
        (QUESTION.encode() + b"\xff\xfe\n", "line 2 is not UTF-8"),
        (gzip.compress(QUESTION.encode()), "is not UTF-8"),
        (b'{"question": "' + b"long " * 99 + b'", "answer": "a"}\n', "the model reads 64"),
    ],
)
@pytest.mark.parametrize("option", ["--recall", "--open-recall"])
def test_faulty_question_file(
    tiny_model: Path, tmp_path: Path, refused: Run, option: str, content: bytes, message: str
) -> None:
    path = tmp_path / "faulty.jsonl"
    path.write_bytes(content)
    line = refused("eval", tiny_model, option, path)
    assert message in line or "do not fit the model's context of 64" in line


def test_missing_inputs(tiny_model: Path, refused: Run, questions: Path) -> None:
    assert "no question file" in refused("eval", tiny_model, "--recall", "nowhere.jsonl")
    assert "no such file" in refused("eval", tiny_model, "--loss", "nowhere.txt")
    assert "no task file" in refused("eval", tiny_model, "--tasks", "nowhere.yaml")
    assert "there is no folder" in refused(
        "eval", tiny_model, "--recall", questions, "--out", "nowhere/deep/found.json"
    )
    assert "is a folder" in refused(
        "eval", tiny_model, "--recall", questions, "--out", questions.parent
    )


def test_result_that_cannot_be_written(
    tiny_model: Path,
    questions: Path,
    tmp_path: Path,
    refused: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = ("eval", tiny_model, "--recall", questions, "--out")
    assert "is not a regular file" in refused(*asked, "/dev/null")
    for number, message in ((errno.ENOSPC, "disk full"), (errno.EROFS, "cannot be written")):

        def fail(*_: object, number: int = number, **__: object) -> None:
            raise OSError(number, os.strerror(number))

        monkeypatch.setattr("pathlib.Path.write_text", fail)
        assert message in refused(*asked, tmp_path / "found.json")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), "nothing to measure"),
        (("--batch-size", 0), "--batch-size 0"),
        (("--limit", 0), "--limit 0"),
        (("--num-fewshot", -1), "--num-fewshot -1"),
        (("--max-new-tokens", 0), "--max-new-tokens 0"),
        (("--template", "no field"), "exactly once"),
        (("--end", "The capital"), "give a text of one"),
        (("--device", "quantum"), "no device 'quantum'"),
    ],
)
def test_impossible_options(
    tiny_model: Path, questions: Path, refused: Run, options: tuple[object, ...], message: str
) -> None:
    asked = ("--recall", questions) if options else ()
    assert message in refused("eval", tiny_model, *asked, *options)


# Text for the loss


def test_faulty_loss_inputs(tiny_model: Path, tmp_path: Path, refused: Run) -> None:
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert "UTF-8" in refused("eval", tiny_model, "--loss", tmp_path / "a.txt")
    (tmp_path / "b.pdf").write_bytes(b"%PDF")
    assert "of no known kind" in refused("eval", tiny_model, "--loss", tmp_path / "b.pdf")
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "manifest.json").write_text("{")
    assert "manifest.json" in refused("eval", tiny_model, "--loss", tmp_path / "tokens")
    (tmp_path / "c.txt").write_text("a text")
    line = refused("eval", tiny_model, "--loss", tmp_path / "c.txt", "--sequence-tokens", 0)
    assert "sequence of 0 tokens" in line
