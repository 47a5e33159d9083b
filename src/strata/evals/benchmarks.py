"""The published benchmarks that strata knows by name: what each measures, and where its rows are.

Those with a file have a task file of ours in `tasks/` over a file in the user's data folder; the
others are tasks of lm-eval-harness, which reads their rows from the Hugging Face hub.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from strata.errors import ConfigError, DataError

Group = Literal["general", "medicine", "law", "hallucination"]
GROUPS: tuple[Group, ...] = ("general", "medicine", "law", "hallucination")
_TASK_FILES = Path(__file__).with_name("tasks")


@dataclass(frozen=True)
class Benchmark:
    """One benchmark.

    Attributes:
        name: of its row in the table, and of the task.
        group: what it is about; medicine and law are the professional setting.
        metric: the figure of its row.
        file: its rows in the data folder; None for a task of the harness.
        task: path of a task file, or the harness's name where it is another than `name`.
        runs_code: whether it runs what the model wrote.
        title: what people call it.
    """

    name: str
    group: Group
    metric: str
    file: str | None = None
    task: str | None = None
    runs_code: bool = False
    title: str = ""

    @property
    def source(self) -> str:
        """What `load_tasks` opens: the path of a task file, or a name of the harness."""
        if self.file is not None and self.task is None:
            return str(_TASK_FILES / f"{self.name}.yaml")
        return self.task or self.name


def _local(name: str, group: Group, metric: str, title: str, file: str = "") -> Benchmark:
    return Benchmark(name, group, metric, file=f"{file or name}.jsonl.gz", title=title)


BENCHMARKS: tuple[Benchmark, ...] = (
    _local("arc_easy", "general", "acc", "ARC easy"),
    _local("arc_challenge", "general", "acc_norm", "ARC challenge"),
    _local("hellaswag", "general", "acc_norm", "HellaSwag"),
    _local("mmlu", "general", "acc", "MMLU"),
    _local("openbookqa", "general", "acc_norm", "OpenBookQA"),
    _local("piqa", "general", "acc", "PIQA"),
    _local("winogrande", "general", "acc", "WinoGrande"),
    _local("boolq", "general", "acc", "BoolQ"),
    _local("lambada", "general", "acc", "LAMBADA"),
    _local("gsm8k_zero_shot", "general", "exact_match", "GSM8k without examples", "gsm8k"),
    Benchmark("nq_open", "general", "exact_match", title="Natural Questions"),
    Benchmark("triviaqa", "general", "exact_match", title="TriviaQA"),
    Benchmark(
        "hotpotqa",
        "general",
        "qa_f1_score",
        task="longbench_hotpotqa",
        title="HotpotQA with its passages (LongBench)",
    ),
    Benchmark("gsm8k", "general", "exact_match", title="GSM8k"),
    Benchmark("ceval", "general", "acc", task="ceval-valid", title="C-Eval"),
    Benchmark("cmmlu", "general", "acc", title="CMMLU"),
    Benchmark("humaneval", "general", "pass@1", runs_code=True, title="HumanEval"),
    Benchmark("mbpp", "general", "pass_at_1", runs_code=True, title="MBPP"),
    _local("medqa", "medicine", "acc", "MedQA, US, four options", "medqa_us"),
    _local("medmcqa", "medicine", "acc", "MedMCQA"),
    _local("pubmedqa", "medicine", "acc", "PubMedQA, PQA-L"),
    _local("jecqa", "law", "acc", "JEC-QA, questions with one right choice"),
    _local("jecqa_all", "law", "acc", "JEC-QA, all questions", "jecqa"),
    _local("truthfulqa_mc1", "hallucination", "acc", "TruthfulQA MC1", "truthfulqa_mc"),
    _local("truthfulqa_mc2", "hallucination", "acc", "TruthfulQA MC2", "truthfulqa_mc"),
    _local("halueval_qa", "hallucination", "acc", "HaluEval QA, judged"),
    _local(
        "halueval_qa_choice",
        "hallucination",
        "acc_norm",
        "HaluEval QA, the likelier answer",
        "halueval_qa",
    ),
    _local("halueval_general", "hallucination", "acc", "HaluEval general, judged"),
    _local("halluqa", "hallucination", "acc", "HalluQA", "halluqa_zh"),
)


def choose(names: Sequence[str], *, data: Path | None, allow_code: bool = False) -> list[Benchmark]:
    """Benchmarks by what a user wrote, in the order of the table, each once.

    Args:
        names: names of `BENCHMARKS`, groups (all that have a file), "all" for every group; a path
            that ends in .yaml is a task file of one's own, of the group general; another name is
            left to the harness.
        data: the folder of the files.
        allow_code: whether benchmarks may run what the model wrote.

    Raises:
        ConfigError: no name, no data folder, or one that runs code and may not.
        DataError: a file is missing in the data folder; the line says which.
    """
    known = {one.name: one for one in BENCHMARKS}
    chosen: dict[str, Benchmark] = {}
    for name in names:
        if name == "all" or name in GROUPS:
            found = [one for one in BENCHMARKS if one.file and name in ("all", one.group)]
        elif name in known:
            found = [known[name]]
        elif name.endswith((".yaml", ".yml")):
            found = [_own(Path(name))]
        else:
            found = [Benchmark(name, "general", "")]
        chosen |= {one.name: one for one in found}
    if not chosen:
        raise ConfigError("no task: give --tasks with names, groups or task files (--list)")
    order = {name: place for place, name in enumerate(known)}
    picked = sorted(chosen.values(), key=lambda one: order.get(one.name, len(order)))
    for one in picked:
        if one.runs_code and not allow_code:
            raise ConfigError(
                f"task {one.name} runs code that the model writes, on this machine: give "
                "--allow-code to let it"
            )
        _check_file(one, data)
    return picked


def _own(path: Path) -> Benchmark:
    return Benchmark(path.stem, "general", "", task=str(path))


def _check_file(one: Benchmark, data: Path | None) -> None:
    if one.file is None:
        return
    if data is None:
        raise ConfigError(f"task {one.name} reads {one.file}: give the folder it is in with --data")
    if not (data / one.file).is_file():
        raise DataError(f"task {one.name} reads {one.file}, which is not in --data {data}")
