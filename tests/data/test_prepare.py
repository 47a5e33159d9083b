"""Prepared folders hold every document once, in an order that only the arguments decide."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiny_documents import Prepare, folder_bytes, make_texts, write_jsonl
from tiny_hub import make_mirror
from tokenizers import Tokenizer

from strata.cli.data import prepare_data
from strata.data.dataset import TokenDataset
from strata.data.filters import FilterConfig
from strata.data.prepare import PrepareConfig
from strata.errors import DataError

EOS = 2


def texts_in(folder: Path, split: str = "train") -> list[str]:
    """The texts of a split, read back through its own tokenizer."""
    dataset = TokenDataset.open(folder, split=split, verify=True)
    bpe = Tokenizer.from_file(str(folder / "tokenizer" / "tokenizer.json"))
    documents = [dataset.document(index) for index in range(dataset.num_documents)]
    assert all(document[-1] == EOS for document in documents)
    return [bpe.decode(document[:-1].tolist(), skip_special_tokens=False) for document in documents]


def test_every_document_once_in_a_shuffled_order(
    tmp_path: Path, prepare_to: Prepare, tight_memory: None
) -> None:
    texts = make_texts(400)
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = prepare_to(tmp_path / "out", source, shard_tokens=2000)
    found = texts_in(tmp_path / "out")
    assert sorted(found) == sorted(texts)
    # Rank correlation with the source order; its standard deviation under the null is 0.05.
    ranks = [int(text.split(":")[0]) for text in found]
    assert abs(np.corrcoef(ranks, np.arange(400))[0, 1]) < 0.2
    assert manifest.num_documents == 400
    shards = manifest.splits["train"].shards
    assert len(shards) > 3 and all(shard.num_tokens <= 2000 for shard in shards)
    assert not (tmp_path / "out" / ".prepare").exists()


def test_no_shuffle_keeps_the_order(
    tmp_path: Path, prepare_to: Prepare, tight_memory: None
) -> None:
    texts = make_texts(200)
    first = write_jsonl(tmp_path / "1.jsonl", texts[:90])
    second = write_jsonl(tmp_path / "2.jsonl", texts[90:])
    prepare_to(tmp_path / "out", first, second, shuffle=False, shard_tokens=1000)
    assert texts_in(tmp_path / "out") == texts


def test_memory_does_not_change_the_bytes(
    tmp_path: Path, prepare_to: Prepare, request: pytest.FixtureRequest
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(300))
    options = {"val_fraction": 0.2, "shard_tokens": 1500}
    prepare_to(tmp_path / "roomy", source, memory_gb=8.0, **options)
    request.getfixturevalue("tight_memory")
    prepare_to(tmp_path / "tight", source, memory_gb=0.5, **options)
    assert folder_bytes(tmp_path / "roomy") == folder_bytes(tmp_path / "tight")


def test_kind_and_split_of_files_do_not_change_the_tokens(
    tmp_path: Path, prepare_to: Prepare
) -> None:
    texts = make_texts(60)
    one = write_jsonl(tmp_path / "a.jsonl", texts)
    (tmp_path / "folder").mkdir()
    write_jsonl(tmp_path / "folder" / "1.jsonl", texts[:20])
    pq.write_table(pa.table({"text": texts[20:]}), tmp_path / "folder" / "2.parquet")
    a = prepare_to(tmp_path / "one", one).splits
    b = prepare_to(tmp_path / "two", tmp_path / "folder").splits
    assert a == b


def test_seeds_give_other_orders(tmp_path: Path, prepare_to: Prepare) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(50))
    prepare_to(tmp_path / "1", source, seed=1)
    prepare_to(tmp_path / "2", source, seed=2)
    one, two = texts_in(tmp_path / "1"), texts_in(tmp_path / "2")
    assert one != two and sorted(one) == sorted(two)


def test_validation_split_is_a_fraction_and_keeps_twins_together(
    tmp_path: Path, prepare_to: Prepare
) -> None:
    texts = make_texts(1000, max_words=3)
    source = write_jsonl(tmp_path / "a.jsonl", texts + texts)
    prepare_to(tmp_path / "out", source, val_fraction=0.1)
    train, val = texts_in(tmp_path / "out"), texts_in(tmp_path / "out", "val")
    assert sorted(train + val) == sorted(texts + texts)
    assert not set(train) & set(val)
    assert 60 < len(set(val)) < 140  # standard deviation 9.5


def test_the_shuffle_of_what_remains_does_not_depend_on_the_split(
    tmp_path: Path, prepare_to: Prepare
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(100))
    prepare_to(tmp_path / "all", source)
    prepare_to(tmp_path / "part", source, val_fraction=0.3)
    rest = set(texts_in(tmp_path / "part"))
    assert texts_in(tmp_path / "part") == [t for t in texts_in(tmp_path / "all") if t in rest]


def test_val_sources_are_val_and_nothing_else_is(
    tmp_path: Path, prepare_to: Prepare, tight_memory: None
) -> None:
    texts = make_texts(300)
    train = write_jsonl(tmp_path / "train.jsonl", texts[:200])
    val = [write_jsonl(tmp_path / f"{n}.jsonl", texts[n : n + 50]) for n in (200, 250)]
    prepare_to(tmp_path / "out", train, val_sources=val, shuffle=False, shard_tokens=900)
    assert texts_in(tmp_path / "out") == texts[:200]
    assert texts_in(tmp_path / "out", "val") == texts[200:]
    prepare_to(tmp_path / "both", train, val_sources=val, val_fraction=0.3)
    found = set(texts_in(tmp_path / "both", "val"))
    assert found > set(texts[200:]) and 0.15 < len(found - set(texts[200:])) / 200 < 0.45
    with pytest.raises(DataError, match="the sources of val are others"):
        prepare_to(tmp_path / "out", train, val_sources=val[:1], shuffle=False, shard_tokens=900)
    with pytest.raises(DataError, match="is given twice"):
        prepare_to(tmp_path / "twice", train, val_sources=[train])


def test_prompts_carry_no_loss(tmp_path: Path, prepare_to: Prepare, tokenizer: Path) -> None:
    rows = [
        {"prompt": "where runs the river?", "completion": " to sea"},
        {"prompt": "", "completion": "the hill"},
        {"prompt": "one stone", "completion": ""},
        {"prompt": "", "completion": ""},
        {"text": "snow lies"},
    ]
    source = tmp_path / "a.jsonl"
    source.write_text("\n".join(json.dumps(row) for row in rows))
    manifest = prepare_to(tmp_path / "out", source, shuffle=False, prepend_bos=True)
    assert manifest.num_empty == 1 and manifest.num_documents == 4
    bpe = Tokenizer.from_file(str(tokenizer / "tokenizer.json"))
    loss_from = np.load(tmp_path / "out" / "train" / "00000.loss_from.npy")
    prompts = [len(bpe.encode(rows[index]["prompt"]).ids) for index in (0, 2)]
    assert loss_from.tolist() == [1 + prompts[0], 0, 1 + prompts[1], 0]
    dataset = TokenDataset.open(tmp_path / "out")
    assert dataset.has_prompts
    text = bpe.decode(dataset.document(0).tolist(), skip_special_tokens=False)
    assert text == "<bos>where runs the river? to sea<eos>"


def test_special_tokens_in_a_text_stay_text(tmp_path: Path, prepare_to: Prepare) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", ["one<eos>two"])
    prepare_to(tmp_path / "text", source)
    prepare_to(tmp_path / "token", source, parse_special_tokens=True, append_eos=False)
    assert texts_in(tmp_path / "text") == ["one<eos>two"]
    assert np.sum(TokenDataset.open(tmp_path / "text").document(0) == EOS) == 1
    assert EOS in TokenDataset.open(tmp_path / "token").document(0)[:-1]


def test_a_document_longer_than_a_shard_has_its_own(
    tmp_path: Path, prepare_to: Prepare, tight_memory: None
) -> None:
    texts = ["stone", "snow " * 5000, "river"]
    source = write_jsonl(tmp_path / "a.jsonl", texts)
    manifest = prepare_to(tmp_path / "out", source, shard_tokens=100, shuffle=False)
    assert [shard.num_documents for shard in manifest.splits["train"].shards] == [1, 1, 1]
    assert texts_in(tmp_path / "out") == texts


def test_a_finished_folder_is_left_alone(tmp_path: Path, prepare_to: Prepare) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(20))
    first = prepare_to(tmp_path / "out", source)
    changed = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}
    assert prepare_to(tmp_path / "out", source, memory_gb=2.0) == first
    assert changed == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*")}


class Killed(BaseException):
    """Stands for the end of the process."""


NEW_PATHS = {
    "filters": {"min_chars": 20, "max_tokens": 70, "rules": {"words": (None, 35)}},
    "near_duplicates": 0.8,
}


@pytest.mark.parametrize("kind", ["files", "mirror"])
def test_dying_at_any_commit_changes_nothing(
    tmp_path: Path,
    prepare_to: Prepare,
    tight_memory: None,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    options: dict[str, object] = {"val_fraction": 0.2, "shard_tokens": 900}
    if kind == "files":
        source = write_jsonl(tmp_path / "a.jsonl", make_texts(400))
        val = write_jsonl(tmp_path / "b.jsonl", make_texts(50, seed=1))
    else:
        pytest.importorskip("datasets")
        pytest.importorskip("rensa")
        source = val = make_mirror(tmp_path / "mirror", with_copies(make_texts(400)))
        options |= NEW_PATHS
    options["val_sources"] = [val]
    whole = prepare_to(tmp_path / "whole", source, **options)
    if kind == "mirror":
        assert set(whole.num_dropped) == {"min_chars", "max_tokens", "words", "near_duplicates"}

    replace = os.replace
    rng = random.Random(0)

    def die_now_and_then(*arguments: object) -> None:
        if rng.random() < 0.15:
            raise Killed
        replace(*arguments)
        if rng.random() < 0.15:
            raise Killed

    monkeypatch.setattr(os, "replace", die_now_and_then)
    deaths = 0
    while True:
        try:
            prepare_to(tmp_path / "broken", source, **options)
            break
        except Killed:
            deaths += 1
            assert deaths < 500, "no progress is kept"
    assert deaths > 10
    assert folder_bytes(tmp_path / "broken") == folder_bytes(tmp_path / "whole")


def with_copies(texts: list[str]) -> list[str]:
    """The texts, each third one long and there again a little later, and some of them short."""
    copied: list[str] = []
    for number, text in enumerate(texts):
        long = " ".join([text, *(f"{number}-{word}" for word in text.split()[:12])])
        copied.append(long if number % 3 == 0 else text)
        if number % 6 == 3:
            copied.append(copied[number // 2] + ".")
    return copied


CHILD = """
import json, os, signal, sys, time
from pathlib import Path
from strata.data import prepare as room
room.plan_memory = lambda *_, **__: room.MemoryPlan(
    batch_bytes=2_000, max_document_bytes=100_000, run_bytes=10_000, range_bytes=20_000
)
source, tokenizer = map(Path, sys.argv[1:3])
options = json.loads(sys.argv[3])
for name in sys.argv[4:]:
    __import__(name)
config = room.PrepareConfig(val_fraction=0.1, shard_tokens=4_000, **options)
for line in sys.stdin:
    kill_after_s, out = json.loads(line)
    started_s = time.monotonic()
    process = os.fork()  # imports are done: whoever is killed is killed at work
    if process == 0:
        room.prepare([source], out=Path(out), tokenizer=tokenizer, config=config)
        os._exit(0)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(process, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
    print(json.dumps([code, time.monotonic() - started_s]), flush=True)
"""


@pytest.mark.parametrize("kind", ["files", "mirror"])
def test_sigkill_at_random_times_changes_nothing(
    tmp_path: Path, tokenizer: Path, kind: str
) -> None:
    options: dict[str, object] = {}
    num_kills, span = 10, (0.0, 0.3)
    if kind == "files":
        source = write_jsonl(tmp_path / "a.jsonl", make_texts(3000))
    else:
        num_kills, span = 8, (0.1, 0.45)  # workers take their time to start
        pytest.importorskip("datasets")
        pytest.importorskip("rensa")
        source = make_mirror(tmp_path / "mirror", with_copies(make_texts(1500)))
        options = {**NEW_PATHS, "workers": 2}
    whole = tmp_path / "whole"

    command = [sys.executable, "-c", CHILD, str(source), str(tokenizer), json.dumps(options)]
    command += ["datasets", "rensa"] if kind == "mirror" else []
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdin is not None and parent.stdout is not None

        def run(out: Path, kill_after_s: float | None) -> tuple[int, float]:
            print(json.dumps([kill_after_s, str(out)]), file=parent.stdin, flush=True)
            code, duration_s = json.loads(parent.stdout.readline())
            return code, duration_s

        code, duration_s = run(whole, None)
        assert code == 0
        rng = random.Random(0)
        for sooner in (1.0, 0.5, 0.25, 0.125):  # the machine may have been busier just now
            broken = tmp_path / f"broken-{sooner}"
            waits_s = [rng.uniform(*span) * sooner * duration_s for _ in range(num_kills)]
            codes = [run(broken, wait_s)[0] for wait_s in waits_s]
            assert run(broken, None)[0] == 0
            assert folder_bytes(broken) == folder_bytes(whole)
            if codes.count(-signal.SIGKILL) >= 3:
                break
        else:
            pytest.fail("it was always done before it was killed three times")
        parent.stdin.close()


def test_a_changed_source_stops_a_resumption(
    tmp_path: Path, prepare_to: Prepare, tight_memory: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(300))

    def die(*arguments: object, **options: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("strata.data.passes.SplitWriter", die)
        with pytest.raises(Killed):
            prepare_to(tmp_path / "out", source)
    write_jsonl(source, make_texts(300, seed=1))
    with pytest.raises(DataError, match="the sources are others or have changed"):
        prepare_to(tmp_path / "out", source)


def test_two_processes_do_not_share_a_folder(
    tmp_path: Path, prepare_to: Prepare, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_jsonl(tmp_path / "a.jsonl", make_texts(10))

    def prepare_again(*arguments: object, **options: object) -> None:
        prepare_to(tmp_path / "out", source)

    monkeypatch.setattr("strata.data.passes.SplitWriter", prepare_again)
    with pytest.raises(DataError, match="another process is preparing"):
        prepare_to(tmp_path / "out", source)


def test_command_line_defaults_are_the_configuration() -> None:
    fields = PrepareConfig.model_fields
    defaults = dict(
        zip(
            prepare_data.__code__.co_varnames[3 : prepare_data.__code__.co_argcount],
            prepare_data.__defaults__ or (),
            strict=True,
        )
    )
    assert defaults.pop("paragraphs") is False and fields["txt_documents"].default == "file"
    assert defaults.pop("as_json") is False and defaults.pop("val") is None
    assert defaults.pop("rule") is None and FilterConfig().rules == {}
    for name, default in defaults.items():
        owner = fields if name in fields else FilterConfig.model_fields
        assert owner[name].default == default, name
    assert set(fields) - set(defaults) == {"txt_documents", "filters"}
    assert set(FilterConfig.model_fields) - set(defaults) == {"rules"}
