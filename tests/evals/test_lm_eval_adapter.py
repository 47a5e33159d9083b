"""Tasks of lm-eval-harness over local files: no network is used."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from strata.errors import ConfigError, DataError
from strata.evals import lm_eval_adapter
from strata.evals.lm_eval_adapter import load_tasks, run_tasks
from strata.models import load

pytest.importorskip("lm_eval")

TASK = """
task: {name}
dataset_path: json
dataset_kwargs:
  cache_dir: {cache}
  data_files: {{test: rows.jsonl}}
output_type: multiple_choice
test_split: test
fewshot_split: test
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
ROWS = [
    {"question": f"which city is {i}?", "choices": ["Paris", "Rome", f"Chad {i}"], "answer": i % 3}
    for i in range(6)
]


@pytest.fixture(autouse=True)
def network(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Where a test tried to connect to: every attempt fails, and is kept."""
    attempts: list[object] = []

    def refuse(*arguments: object, **_: object) -> None:
        attempts.append(arguments)
        raise OSError("there is no network in tests")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    return attempts


@pytest.fixture
def opened(tiny_model: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    return load(tiny_model)


@pytest.fixture
def task_file(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    path = tmp_path / "cities.yaml"
    path.write_text(TASK.format(name="cities", cache=tmp_path / "cache"))
    return path


def test_local_task_scores_what_the_likelihoods_say(
    opened: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    task_file: Path,
    network: list[object],
) -> None:
    model, tokenizer = opened
    model.train()
    (measure,) = run_tasks(model, load_tasks([str(task_file)]), tokenizer=tokenizer, batch_size=4)
    assert model.training
    model.eval()
    right = 0
    for row in ROWS:
        prompt = f"Question: {row['question']}\nAnswer:"
        scores = []
        for choice in row["choices"]:
            ids = tokenizer(f"{prompt} {choice}")["input_ids"]
            start = len(tokenizer(prompt)["input_ids"])
            log_probs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            scores.append(sum(log_probs[i - 1, ids[i]].item() for i in range(start, len(ids))))
        right += scores.index(max(scores)) == row["answer"]
    assert (measure.source, measure.metric) == ("cities", "acc")
    assert measure.value == pytest.approx(right / 6)
    assert (measure.num_samples, measure.num_fewshot) == (6, 0)
    assert measure.stderr is not None
    assert not network


def test_limit_and_fewshot(
    opened: tuple[PreTrainedModel, PreTrainedTokenizerBase], task_file: Path
) -> None:
    model, tokenizer = opened
    tasks = load_tasks([str(task_file)], num_fewshot=1)
    (measure,) = run_tasks(model, tasks, tokenizer=tokenizer, limit=2)
    assert (measure.num_samples, measure.num_fewshot) == (2, 1)


def test_task_longer_than_the_context_is_one_line(
    opened: tuple[PreTrainedModel, PreTrainedTokenizerBase], task_file: Path
) -> None:
    model, tokenizer = opened
    row = {"question": "which?", "choices": ["sea " * 90, "a"], "answer": 0}
    (task_file.parent / "rows.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ConfigError, match="exceeds the model's context of 64"):
        run_tasks(model, load_tasks([str(task_file)]), tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("task: [", "is not YAML"),
        ("a list\n", "cannot be read"),
        ("output_type: multiple_choice\n", "has no 'task' key"),
        ("task: [a]\n", "has no 'task' key"),
        ("group: a\ntask: [b]\n", "is a group: give the task files"),
        ("include: nowhere.yaml\ntask: a\n", "cannot be read"),
        ("task: a\noutput_type: guess\n", "cannot be built"),
        ("task: a\ndataset_path: json\n", "dataset_path json needs dataset_kwargs.data_files"),
        ("task: a\ndataset_path: json\ndataset_kwargs: 3\n", "dataset_kwargs must be a mapping"),
        ("doc_to_text: !function nowhere.f\ntask: a\n", "cannot be read"),
        (b"\xff\xfe\x00", "is not YAML"),
    ],
)
def test_faulty_task_file_is_one_line(tmp_path: Path, content: str | bytes, message: str) -> None:
    path = tmp_path / "task.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        load_tasks([str(path)])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_task_whose_data_lacks_a_field(task_file: Path) -> None:
    (task_file.parent / "rows.jsonl").write_text('{"question": "which?"}\n')
    with pytest.raises(ConfigError, match=r"cities\.yaml: the task cannot be built"):
        load_tasks([str(task_file)])


def test_missing_task_file_and_wrong_numbers(
    opened: tuple[PreTrainedModel, PreTrainedTokenizerBase], task_file: Path
) -> None:
    model, tokenizer = opened
    with pytest.raises(ConfigError, match="no task file at"):
        load_tasks([str(task_file), "nowhere.yaml"])
    with pytest.raises(ConfigError, match="no task: give"):
        load_tasks([])
    with pytest.raises(ConfigError, match="num-fewshot -1"):
        load_tasks([str(task_file)], num_fewshot=-1)
    tasks = load_tasks([str(task_file)])
    with pytest.raises(ConfigError, match="limit 0"):
        run_tasks(model, tasks, tokenizer=tokenizer, limit=0)
    with pytest.raises(ConfigError, match="batch size 0"):
        run_tasks(model, tasks, tokenizer=tokenizer, batch_size=0)


def test_unknown_name_and_unreachable_hub() -> None:
    """The harness's own index takes many seconds to read: a stand-in, and the slow test below."""

    def load(_: list[str]) -> Any:
        raise ConnectionError("Couldn't reach the Hub")

    index = {"arc_easy": None, "piqa": None}
    manager: Any = SimpleNamespace(task_index=index, all_tasks=list(index), load=load)
    with pytest.raises(ConfigError, match=r"no task 'arc_eazy' .*near to it: arc_easy"):
        lm_eval_adapter._load("arc_eazy", manager)
    with pytest.raises(DataError, match="'piqa' reads its data from the Hugging Face hub"):
        lm_eval_adapter._load("piqa", manager)


@pytest.mark.slow
def test_names_of_the_harness(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)  # else it retries for long
    with pytest.raises(ConfigError, match="near to it: arc_easy"):
        load_tasks(["arc_eazy"])
    with pytest.raises(DataError, match="cannot be reached"):
        load_tasks(["piqa"])


def test_without_the_extra_the_line_names_it(
    task_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def hide(name: str, *rest: Any) -> Any:
        if name.startswith("lm_eval"):
            raise ImportError("No module named 'lm_eval'", name="lm_eval")
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", hide)
    with pytest.raises(ConfigError, match=r"pip install 'strata-lm\[eval\]'"):
        load_tasks([str(task_file)])


def test_sample_task_of_the_examples(tmp_path: Path) -> None:
    """The published example is a whole task file; its data lies beside it."""
    folder = Path(__file__).parents[2] / "examples" / "tasks"
    text = (folder / "capitals.yaml").read_text(encoding="utf-8")
    kwargs = f"dataset_kwargs:\n  cache_dir: {tmp_path / 'cache'}\n"
    (tmp_path / "capitals.yaml").write_text(text.replace("dataset_kwargs:\n", kwargs))
    (tmp_path / "capitals.jsonl").write_bytes((folder / "capitals.jsonl").read_bytes())
    (task,) = load_tasks([str(tmp_path / "capitals.yaml")]).tasks.values()
    assert len(task.eval_docs) == 12
