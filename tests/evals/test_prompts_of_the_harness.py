"""Our task files ask what the harness's own tasks ask, string for string, of the same rows."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

import tiny_benchmarks

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from strata.evals.benchmarks import BENCHMARKS
from strata.evals.lm_eval_adapter import load_tasks

KNOWN = {one.name: one for one in BENCHMARKS}
LETTERS = "ABCD"
Row = dict[str, Any]


def _arc(row: Row) -> Row:
    choices = {"text": row["choices"], "label": list(LETTERS)}
    return {"question": row["question"], "choices": choices, "answerKey": LETTERS[row["answer"]]}


def _openbookqa(row: Row) -> Row:
    return _arc(row) | {"question_stem": row["question"]}


def _piqa(row: Row) -> Row:
    one, two = row["choices"]
    return {"goal": row["question"], "sol1": one, "sol2": two, "label": row["answer"]}


def _hellaswag(row: Row) -> Row:
    label, _, text = row["question"].partition(": ")
    whole, _, begun = text.rpartition(". ")
    return {
        "activity_label": label, "ctx_a": f"{whole}.", "ctx_b": begun, "endings": row["choices"],
        "label": str(row["answer"]),
    }  # fmt: skip


def _winogrande(row: Row) -> Row:
    before = row["question"].partition("_")[0]
    one, two = (option.removeprefix(before) for option in row["context_options"])
    return {"sentence": row["question"], "option1": one, "option2": two,
            "answer": str(row["answer"] + 1)}  # fmt: skip


def _boolq(row: Row) -> Row:
    question = row["question"].removesuffix("?")
    return {"passage": row["context"], "question": question, "label": row["answer"]}


def _lambada(row: Row) -> Row:
    return {"text": f"{row['question']} {row['answers'][0]}"}


def _gsm8k(row: Row) -> Row:
    return {"question": row["question"], "answer": f"#### {row['answers'][0]}"}


def _medqa(row: Row) -> Row:
    endings = {f"ending{n}": choice for n, choice in enumerate(row["choices"])}
    return {"sent1": row["question"], "label": row["answer"], **endings}


def _medmcqa(row: Row) -> Row:
    options = dict(zip(("opa", "opb", "opc", "opd"), row["choices"], strict=True))
    return {"question": row["question"], "cop": row["answer"], **options}


def _pubmedqa(row: Row) -> Row:
    return {"QUESTION": row["question"], "CONTEXTS": [row["context"]],
            "final_decision": row["choices"][row["answer"]]}  # fmt: skip


def _asked(task: Any, *, shots: int = 0) -> list[tuple[Any, ...]]:
    task.set_config(key="num_fewshot", value=shots)
    task.set_fewshot_seed(seed=1234)
    task.build_all_requests()
    return [request.args for request in task.instances]


def _theirs(path: str, rows: Mapping[str, Sequence[Row]], folder: Path) -> Any:
    """The task of a file of the harness, its rows from here instead of the hub."""
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / path)
    files = {}
    for split, given in rows.items():
        files[split] = str(folder / f"hub_{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in given))
    for key in ("tag", "task_alias", "dataset_name"):
        config.pop(key, None)
    config |= {"dataset_path": "json", "dataset_kwargs": {"data_files": files}}
    return TaskManager(include_defaults=False).load([config])["tasks"][config["task"]]


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.mark.parametrize(
    ("name", "path", "as_on_the_hub"),
    [
        ("arc_easy", "arc/arc_easy.yaml", _arc),
        ("arc_challenge", "arc/arc_challenge.yaml", _arc),
        ("openbookqa", "openbookqa/openbookqa.yaml", _openbookqa),
        ("piqa", "piqa/piqa.yaml", _piqa),
        ("hellaswag", "hellaswag/hellaswag.yaml", _hellaswag),
        ("winogrande", "winogrande/default.yaml", _winogrande),
        ("boolq", "super_glue/boolq/default.yaml", _boolq),
        ("lambada", "lambada/lambada_openai.yaml", _lambada),
        ("medqa", "medqa/medqa.yaml", _medqa),
        ("medmcqa", "medmcqa/medmcqa.yaml", _medmcqa),
        ("pubmedqa", "pubmedqa/pubmedqa.yaml", _pubmedqa),
        ("gsm8k_zero_shot", "gsm8k/gsm8k.yaml", _gsm8k),
    ],
)
def test_prompts_and_answers(
    name: str, path: str, as_on_the_hub: Callable[[Row], Row], tmp_path: Path
) -> None:
    data = tiny_benchmarks.write(tmp_path / "data")
    file = str(KNOWN[name].file)
    rows = tiny_benchmarks.rows()[file.removesuffix(".jsonl.gz")]
    given = [as_on_the_hub(row) for row in rows if row.get("split") != "train"]
    hub = _theirs(path, {split: given for split in ("train", "validation", "test")}, tmp_path)
    own = load_tasks([KNOWN[name].source], data=data).tasks[name]
    asked, wanted = _asked(own), _asked(hub)
    if name == "gsm8k_zero_shot":  # ours ends elsewhere and keeps less
        asked, wanted = [(text,) for text, _ in asked], [(text,) for text, _ in wanted]
    assert len(asked) >= 5 and asked == wanted
    if name not in ("lambada", "gsm8k_zero_shot"):
        targets = [str(own.doc_to_target(row)) for row in own.task_docs]
        golds = [str(hub.doc_to_target(row)) for row in hub.task_docs]
        if name == "pubmedqa":
            golds = [str(["yes", "no", "maybe"].index(gold)) for gold in golds]
        assert targets == golds


@pytest.mark.parametrize("shots", [0, 2])
def test_mmlu_with_examples_of_the_subject(
    shots: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = tiny_benchmarks.rows()["mmlu"]
    for number, row in enumerate(rows):  # two further subjects, whose rows it must not take
        row["subject"] = ("high_school_biology", "law")[number % 2]
    monkeypatch.setattr(tiny_benchmarks, "rows", lambda: {"mmlu": rows})
    data = tiny_benchmarks.write(tmp_path / "data")
    own = load_tasks([KNOWN["mmlu"].source], data=data).tasks["mmlu"]
    asked = _asked(own, shots=shots)
    subjects = [row["subject"] for row in own.task_docs]
    chosen = [four for at, four in enumerate(zip(*[iter(asked)] * 4, strict=True))
              if subjects[at] == "high_school_biology"]  # fmt: skip
    biology = [row for row in rows if row["subject"] == "high_school_biology"]
    split = {
        name: [{k: row[k] for k in ("question", "choices", "answer", "subject")}
               for row in biology if row["split"] == name]
        for name in ("test", "dev")
    }  # fmt: skip
    hub = _theirs("mmlu/default/mmlu_high_school_biology.yaml", split, tmp_path)
    assert [args for four in chosen for args in four] == _asked(hub, shots=shots)
    assert len(chosen) >= 2
