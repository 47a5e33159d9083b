"""The reader's exam: a bank of the test references, and every format of knowledge over it.

OUT/bank/         the references, as memories of this one model
OUT/report.json   what `strata eval memory` measures, with given references and with found ones
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from strata.config import load_config
from strata.errors import ModelError
from strata.evals.memory import FORMATS, MemoryEvaluation, eval_memory
from strata.evals.questions import read_questions
from strata.evals.scoring import Progress
from strata.explicit.bank import Bank
from strata.explicit.documents import read_documents
from strata.explicit.settings import ExplicitMemoryConfig
from strata.explicit.source import open_retriever
from strata.files import storage_errors
from strata.models import load
from strata.train import Recipe
from strata.train.recipe import RECIPE_NAME

REPORT_NAME = "report.json"
CODECS = ("int8", "int4")  # faiss needs more keys than a tiny model has


@dataclass(frozen=True)
class Exam:
    """How one model reads.

    Attributes:
        stage: whose model it is, by its folder.
        oracle: given the one reference that answers.
        search: given what was found.
    """

    stage: str
    oracle: MemoryEvaluation
    search: MemoryEvaluation


def examine(
    data: Path,
    *,
    run: Path,
    out: Path | None = None,
    stage: str | None = None,
    codecs: Sequence[str] = CODECS,
    top_k: int = 5,
    limit: int | None = None,
    max_new_tokens: int = 16,
    embedder: str | None = "minilm",
    progress: Progress | None = None,
) -> Exam:
    """Ask the test questions in every format, and write the report.

    Args:
        data: a folder of `strata reader data`.
        run: the folder of `strata reader train`.
        out: for bank and report, a bank that is there already is gone on with; None for
            RUN/exam/STAGE.
        stage: whose model; None for the last finished one.
        codecs: in which memories are stored, beside the bank's own.
        top_k: references found for a question.
        limit: first questions only.
        max_new_tokens: longest answer.
        embedder: for the search; None searches by words.
        progress: told of the questions done, from the start for each way to find.

    Raises:
        ModelError: no such stage is finished, or its model is damaged.
        BankError: another model's bank is in `out`.
        DataError: the questions or references are missing or damaged.
        StorageError: the disk is full.
    """
    folder = _finished(run, stage)
    out = run / "exam" / folder.name if out is None else out
    test = data / "eval" / "test"
    questions = read_questions(test / "questions.jsonl")[:limit]
    recipe = load_config(Recipe, folder / RECIPE_NAME)
    memory = ExplicitMemoryConfig() if recipe.reading is None else recipe.reading.memory
    model, tokenizer = load(folder / "model")
    bank = _bank(out / "bank", test / "bank", model, tokenizer, memory, embedder)
    results = [
        eval_memory(
            model,
            tokenizer,
            bank,
            questions,
            retriever=retriever,
            formats=FORMATS,
            codecs=codecs,
            top_k=top_k,
            max_new_tokens=max_new_tokens,
            progress=progress,
        )
        for retriever in (None, open_retriever(bank))
    ]
    exam = Exam(folder.name, *results)
    with storage_errors(out):
        text = json.dumps(asdict(exam), ensure_ascii=False, indent=1)
        (out / REPORT_NAME).write_text(text + "\n", encoding="utf-8")
    return exam


def _finished(run: Path, stage: str | None) -> Path:
    """The folder of a finished stage."""
    folders = [model.parent for model in sorted(run.glob("[0-9][0-9]-*/model"))]
    if not folders:
        raise ModelError(f"no finished stage in {run}: teach it with strata reader train")
    if stage is None:
        return folders[-1]
    for folder in folders:
        if stage in (folder.name, folder.name[3:]):
            return folder
    names = ", ".join(folder.name for folder in folders)
    raise ModelError(f"{run} has no finished stage {stage!r}: give one of {names}")


def _bank(
    path: Path,
    references: Path,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    memory: ExplicitMemoryConfig,
    embedder: str | None,
) -> Bank:
    """A bank of the references for this model; one that was begun is finished."""
    documents = list(read_documents([references], id_field="id"))
    if (path / "bank.json").exists():
        bank = Bank.open(path).use(model, tokenizer)
    else:
        path.parent.mkdir(parents=True, exist_ok=True)
        bank = Bank.create(path, model=model, tokenizer=tokenizer, config=memory, embedder=embedder)
    bank.add(documents)
    return bank
