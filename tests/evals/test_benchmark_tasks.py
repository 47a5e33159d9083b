"""Benchmarks of lm-eval-harness with and without memory, over tiny rows of our own."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import strata
import tiny_benchmarks
from strata.errors import BankError, ConfigError, DataError
from strata.evals.benchmarks import BENCHMARKS, GROUPS, Benchmark, choose
from strata.explicit.hits import Hit
from strata.explicit.settings import ExplicitMemoryConfig
from strata.explicit.source import BankSource, open_retriever

pytest.importorskip("lm_eval")
pytest.importorskip("lance")

from lm_eval.api.instance import Instance
from lm_eval.evaluator import simple_evaluate
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from strata.evals import memory_lm, task_rows
from strata.evals.bank_reading import BankReading, Given
from strata.evals.lm_eval_adapter import load_tasks
from strata.evals.memory_lm import MemoryLM
from strata.evals.question_references import QuestionReferences, QuestionText, Tally, question_of
from strata.evals.task_runs import GivenBank, TaskResult, TaskSettings, run_benchmarks
from strata.evals.task_table import results_json, results_markdown
from strata.explicit.attach import attach

KNOWN = {one.name: one for one in BENCHMARKS}
TOWNS = {
    "aral": "Aral is known for its salt, which carts bring down to the sea each spring.",
    "bryn": "Shepherds of Bryn shear in June; wool is what they live by.",
    "cairn": "Around Cairn there is peat.",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_benchmarks.write(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module", autouse=True)
def _cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = tmp_path_factory.mktemp("cache")
    yield
    datasets.config.HF_DATASETS_CACHE = before


@pytest.fixture
def model(model: PreTrainedModel) -> PreTrainedModel:
    model.config.max_position_embeddings = 1024  # rotary positions have no end
    return model


@pytest.fixture
def bank(tmp_path: Path, model: Any, tokenizer: Any) -> strata.Bank:
    config = ExplicitMemoryConfig(reference_tokens=128, tokens_per_head=4)
    bank = strata.Bank.create(tmp_path / "bank", model=model, tokenizer=tokenizer, config=config)
    bank.add([strata.Document(text, name) for name, text in TOWNS.items()])
    return bank


@pytest.fixture
def given(bank: strata.Bank) -> dict[str, GivenBank]:
    return {"": GivenBank(bank, open_retriever(bank, "text"), "text")}


def settings(data: Path, **changes: Any) -> TaskSettings:
    fields: dict[str, Any] = dict(
        data=data, num_fewshot=None, limit=None, top_k=2, leak_threshold=0.95, batch_size=4
    )
    return TaskSettings(**(fields | changes))


def run(
    names: Sequence[str],
    memories: Sequence[str],
    model: Any,
    tokenizer: Any,
    data: Path,
    out: Path,
    banks: Any = None,
    **changes: Any,
) -> list[TaskResult]:
    kept = {name: changes.pop(name) for name in ("progress", "on_result") if name in changes}
    return run_benchmarks(
        model, tokenizer, choose(names, data=data), memories, banks=banks or {},
        settings=settings(data, **changes), out=out, **kept,
    )  # fmt: skip


def test_every_task_file_says_what_the_list_says() -> None:
    local = [one for one in BENCHMARKS if one.file is not None]
    written = {Path(one.source) for one in local}
    assert written == set(Path(local[0].source).parent.glob("*.yaml"))
    assert len({one.name for one in BENCHMARKS}) == len(BENCHMARKS)
    assert {one.group for one in local} == set(GROUPS)

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))
    for one in local:
        tree = yaml.load(Path(one.source).read_text(encoding="utf-8"), Loader=Loader)
        assert tree["task"] == one.name
        assert tree["dataset_kwargs"] == {"data_files": {"test": one.file}}
        assert one.metric in [metric["metric"] for metric in tree["metric_list"]]
        assert tree["doc_to_decontamination_query"] == "question"


def test_every_task_runs_to_the_end_with_every_memory(
    model: Any, tokenizer: Any, data: Path, tmp_path: Path, given: Any
) -> None:
    shown: list[int] = []
    results = run(
        ["all"], ["none", "text", "explicit"], model, tokenizer, data, tmp_path / "out", given,
        limit=2, on_result=lambda so_far: shown.append(len(so_far)),
    )  # fmt: skip
    local = [one for one in BENCHMARKS if one.file is not None]
    assert [(r.task, r.memory) for r in results] == [
        (one.name, memory) for one in local for memory in ("none", "text", "explicit")
    ]
    assert shown == list(range(1, len(results) + 1))
    for result in results:
        assert result.measure.source == result.task
        assert result.measure.metric.partition(" (")[0] == KNOWN[result.task].metric
        assert result.measure.value is not None and 0 <= result.measure.value <= 1
        assert result.measure.num_samples == 2 == result.tally.questions
        assert (result.tally.references > 0) == (result.memory != "none")
    assert not list((tmp_path / "out" / "unfinished").iterdir())
    table = results_markdown(results, model="tiny", leak_threshold=2 / 3)
    assert "| general | arc_easy | acc | 0 | 2 |" in table
    assert "Leak filter: a reference of which more than 0.667 stands in the question" in table
    tree = results_json(results, leak_threshold=1.0)
    assert json.loads(json.dumps(tree))["leak_filter"]["off"]
    assert len(tree["results"]) == len(results)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3"])
def test_other_decoders(kind: str, tokenizer: Any, data: Path, tmp_path: Path) -> None:
    shape = dict(
        vocab_size=320, hidden_size=32, intermediate_size=32, num_hidden_layers=2, head_dim=16,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=1024,
        initializer_range=0.5, bos_token_id=None, eos_token_id=0, pad_token_id=1,
    )  # fmt: skip
    config = AutoConfig.for_model(kind, **shape)
    other = AutoModelForCausalLM.from_config(config).eval()
    memory = ExplicitMemoryConfig(reference_tokens=128, tokens_per_head=4)
    bank = strata.Bank.create(tmp_path / "own", model=other, tokenizer=tokenizer, config=memory)
    bank.add([strata.Document(text, name) for name, text in TOWNS.items()])
    banks = {"": GivenBank(bank, open_retriever(bank, "text"), "text")}
    results = run(
        ["arc_easy", "lambada"], ["none", "text", "explicit"], other, tokenizer, data,
        tmp_path / "out", banks, limit=3,
    )  # fmt: skip
    assert len(results) == 6
    perplexity = [r.measures[0].value for r in results if r.task == "lambada"]
    assert len(set(perplexity)) == 3  # what is read changes what is answered


@pytest.mark.parametrize(
    ("name", "shots"), [("arc_easy", 0), ("lambada", 0), ("gsm8k_zero_shot", 0), ("mmlu", 2)]
)
def test_without_memory_the_figures_are_the_harness_s_own(
    name: str, shots: int, model: Any, tokenizer: Any, data: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # takes seconds
    monkeypatch.setenv("DISABLE_MULTIPROC", "1")  # else theirs forks under Lance's threads
    (ours,) = run([name], ["none"], model, tokenizer, data, tmp_path / "out", num_fewshot=shots)
    from lm_eval.tasks._yaml_loader import load_yaml

    config = load_yaml(KNOWN[name].source)
    config["dataset_kwargs"] = {"data_files": {"test": str(data / str(KNOWN[name].file))}}
    theirs: Any = simple_evaluate(
        HFLM(pretrained=model, tokenizer=tokenizer, batch_size=4), tasks=[config],
        num_fewshot=shots, bootstrap_iters=1000, log_samples=True,
        task_manager=TaskManager(include_defaults=False),
    )  # fmt: skip
    found = theirs["results"][name]
    for measure in ours.measures:
        metric, _, chosen = measure.metric.partition(" (")
        key = f"{metric},{chosen.removesuffix(')') or 'none'}"
        assert measure.value == found[key]
        assert measure.stderr == found[key.replace(",", "_stderr,", 1)]
    prompts = [sample["arguments"][0][0] for sample in theirs["samples"][name]]
    if name == "mmlu":
        assert ours.measure.num_fewshot == 2
        for sample, prompt in zip(theirs["samples"][name], prompts, strict=True):
            subject = sample["doc"]["subject"].replace("_", " ")
            assert prompt.startswith(f"The following are multiple choice questions (with answers) "
                                     f"about {subject}.\n\nOnce more: ")  # fmt: skip
            assert prompt.count("Answer:") == 3


def _requests(texts: Sequence[tuple[str, ...]], kind: str = "loglikelihood") -> list[Instance]:
    """A question for each prompt; texts of one prompt are its choices."""
    requests = []
    for number, (prompt, *answers) in enumerate(texts):
        for place, answer in enumerate(answers):
            arguments: Any = (prompt, answer)
            if kind == "generate_until":
                arguments = (prompt, {"until": ["\n"], "max_gen_toks": 6, "do_sample": False})
            requests.append(
                Instance(kind, {"question": prompt}, arguments, place, ("asked", number, 1))  # type: ignore[arg-type]
            )
    return requests


class AsksThePrompt:
    """A task of the harness, as far as a question needs one."""

    config = SimpleNamespace(
        doc_to_choice=None, should_decontaminate=True, doc_to_decontamination_query="question"
    )

    def doc_to_text(self, row: Any) -> str:
        return row["question"]

    def doc_to_target(self, row: Any) -> str:
        return "nothing"


QUESTIONS = [
    ("What does Aral sell, its salt?", " salt", " wool and more wool"),
    ("And Bryn, is wool", " sold there"),
    ("Of Zork nobody knows?", " salt", " peat"),
]


@pytest.fixture
def asked(model: Any, tokenizer: Any, bank: strata.Bank) -> Callable[..., MemoryLM]:
    def make(memory: str, **changes: Any) -> MemoryLM:
        retriever = open_retriever(bank, "text")
        references = QuestionReferences(retriever, tokenizer.encode, top_k=1, leak_threshold=1.0)
        reading = None
        if memory == "explicit":
            source = BankSource.of(bank, model, tokenizer, retriever=retriever)
            reading = BankReading(model, tokenizer, source)
        return MemoryLM(
            model, tokenizer, tasks={"asked": AsksThePrompt()}, batch_size=3,
            references=references, reading=reading, **changes,
        )  # fmt: skip

    return make


def test_text_is_the_harness_s_answer_behind_the_references(
    model: Any, tokenizer: Any, asked: Any
) -> None:
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    found = {0: TOWNS["aral"], 1: TOWNS["bryn"]}
    behind = [
        (f"{found[n]}\n\n{prompt}" if n in found else prompt, *answers)
        for n, (prompt, *answers) in enumerate(QUESTIONS)
    ]
    lm = asked("text")
    scores = lm.loglikelihood(_requests(QUESTIONS))
    assert scores == plain.loglikelihood(_requests(behind), disable_tqdm=True)
    assert scores != plain.loglikelihood(_requests(QUESTIONS), disable_tqdm=True)
    assert lm.tally == Tally(questions=3, references=2, empty_handed=1)
    written = asked("text").generate_until(_requests(QUESTIONS, "generate_until"))
    wanted = plain.generate_until(_requests(behind, "generate_until"), disable_tqdm=True)
    assert written == wanted


def test_texts_that_have_no_room_are_left_out(model: Any, asked: Any) -> None:
    model.config.max_position_embeddings = 40
    lm = asked("text")
    scores = lm.loglikelihood(_requests(QUESTIONS[1:2]))
    assert lm.tally == Tally(questions=1, empty_handed=1, no_room=1)
    plain = HFLM(pretrained=model, tokenizer=lm.tokenizer, batch_size=3)
    assert scores == plain.loglikelihood(_requests(QUESTIONS[1:2]), disable_tqdm=True)


def test_memories_are_read_as_attach_reads_them(
    model: Any, tokenizer: Any, bank: strata.Bank, asked: Any
) -> None:
    scores = asked("explicit").loglikelihood(_requests(QUESTIONS))
    written = asked("explicit").generate_until(_requests(QUESTIONS, "generate_until"))
    hits = {one.source: [one] for name in TOWNS for one in bank.of_source(name)}
    expected: list[tuple[float, bool]] = []
    texts: list[str] = []
    for number, (prompt, *answers) in enumerate(QUESTIONS):
        own = hits[("aral", "bryn")[number]] if number < 2 else []
        with attach(model, Given(own, bank.load), tokenizer=tokenizer, config=bank.settings.config):
            for answer in answers:
                ids = tokenizer(prompt + answer)["input_ids"]
                start = len(tokenizer(prompt)["input_ids"])
                with torch.no_grad():
                    log_tv = model(torch.tensor([ids])).logits[0].log_softmax(-1)
                picked = [log_tv[i - 1, ids[i]].item() for i in range(start, len(ids))]
                best = [log_tv[i - 1].argmax().item() for i in range(start, len(ids))]
                expected.append((sum(picked), best == ids[start:]))
                inputs = tokenizer(prompt, return_tensors="pt")
                new = model.generate(**inputs, max_new_tokens=6, do_sample=False)
                text = tokenizer.decode(
                    new[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
                )
                texts.append(text.partition("\n")[0])
    assert [score for score, _ in scores] == pytest.approx([s for s, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in scores] == [greedy for _, greedy in expected]
    assert written == texts
    plain = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=3)
    without = plain.loglikelihood(_requests(QUESTIONS), disable_tqdm=True)
    assert [s for s, _ in without[3:]] == pytest.approx([s for s, _ in scores[3:]], abs=1e-4)
    assert all(abs(a[0] - b[0]) > 1e-3 for a, b in zip(scores[:3], without[:3], strict=True))


def test_leaks_are_left_out_and_the_next_takes_their_place(tokenizer: Any) -> None:
    class Finds:
        runs_model = False

        def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
            texts = ["Aral sells fine salt", "", "Bryn is far away from it", "Cairn has peat"]
            hits = [Hit(f"{n}", 1.0, text, "s", 0, 1) for n, text in enumerate(texts)]
            return [hits[:top_k] for _ in queries]

    question = QuestionText("Aral?", "What does Aral sell?\nAral sells fine salt\nwool")

    def find(threshold: float, top_k: int = 1) -> tuple[list[str], int]:
        made = QuestionReferences(Finds(), tokenizer.encode, top_k=top_k, leak_threshold=threshold)
        ((hits, leaks),) = made.find([question])
        return [hit.id for hit in hits], leaks

    assert find(1.0) == (["0"], 0)
    assert find(2 / 3, 2) == (["2", "3"], 1)
    assert find(2 / 3) == ([], 1)  # of two looked at, one repeats the answer and one has no token
    with pytest.raises(ConfigError, match="top_k 0"):
        find(1.0, 0)
    with pytest.raises(ConfigError, match=r"leak threshold 1\.5"):
        find(1.5)


def test_what_is_searched_with_holds_no_answer(data: Path) -> None:
    names = [KNOWN[name].source for name in ("lambada", "winogrande", "arc_easy")]
    tasks = load_tasks(names, data=data).tasks
    cloze = question_of(tasks["lambada"], tasks["lambada"].task_docs[0])
    assert cloze.query.endswith("and the carts") and cloze.whole.endswith("and the carts\n leave")
    gap = question_of(tasks["winogrande"], tasks["winogrande"].task_docs[0])
    assert "_ was faster" in gap.query and gap.whole.count("passed the mule") == 2
    choice = question_of(tasks["arc_easy"], tasks["arc_easy"].task_docs[0])
    assert choice.query == "What does the town of Aral sell?"
    assert choice.whole.endswith("Answer:\nsalt from Aral\nwool from Bryn\npeat from Cairn\n"
                                 "tin from Dunn")  # fmt: skip


class Stop(Exception):
    """What a kill is to a test."""


@pytest.mark.parametrize("memory", ["none", "explicit"])
def test_an_interrupted_run_goes_on_and_a_finished_one_is_left(
    memory: str, model: Any, tokenizer: Any, data: Path, tmp_path: Path, given: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(memory_lm, "PART", {"loglikelihood": 1, "generate_until": 1})
    arguments = (["arc_easy"], [memory], model, tokenizer, data)
    (whole,) = run(*arguments, tmp_path / "whole", given)

    def stop_at(count: int) -> Any:
        def tell(done: int, total: int) -> None:
            assert total == 20
            if done >= count:
                raise Stop

        class Told:
            def __enter__(self) -> Any:
                return tell

            def __exit__(self, *_: Any) -> None:
                return None

        return lambda title: Told()

    with pytest.raises(Stop):
        run(*arguments, tmp_path / "out", given, progress=stop_at(8))
    (log,) = (tmp_path / "out" / "unfinished").iterdir()
    assert len(log.read_bytes().splitlines()) == 2
    with open(log, "ab") as file:
        file.write(b'{"asked": "torn')
    asked: list[int] = []
    handle = model.register_forward_pre_hook(lambda _, inputs: asked.append(len(inputs[0])))
    (result,) = run(*arguments, tmp_path / "out", given)
    assert asked.count(4) == 3  # a question is a batch here; two of five were answered
    assert (result.measures, result.tally) == (whole.measures, whole.tally)
    assert not log.exists()
    asked.clear()
    assert run(*arguments, tmp_path / "out", given) == [result] and not asked
    handle.remove()
    with pytest.raises(ConfigError, match="holds for another limit than now"):
        run(*arguments, tmp_path / "out", given, limit=1)
    torch.nn.init.zeros_(model.model.norm.weight)
    error = BankError if memory == "explicit" else ConfigError
    with pytest.raises(error, match=r"other weights|holds for another model"):
        run(*arguments, tmp_path / "out", given)


def test_a_cold_bank_gives_the_same_and_is_warm_after(
    model: Any, tokenizer: Any, data: Path, tmp_path: Path, bank: strata.Bank, given: Any
) -> None:
    cold = strata.Bank.create(
        tmp_path / "cold", model=model, tokenizer=tokenizer, config=bank.settings.config
    )
    cold.add([strata.Document(text, name) for name, text in TOWNS.items()], cold=True)
    banks = {"": GivenBank(cold, open_retriever(cold, "text"), "text")}
    arguments = (["arc_easy"], ["explicit"], model, tokenizer, data)
    (warm,) = run(*arguments, tmp_path / "warm", given, limit=2)
    (made,) = run(*arguments, tmp_path / "made", banks, limit=2)
    assert made.measures == warm.measures and made.tally == warm.tally
    assert cold.stats().cold < 3
    assert run(*arguments, tmp_path / "made", banks, limit=2) == [made]


def test_what_cannot_be_is_one_line(
    model: Any, tokenizer: Any, data: Path, tmp_path: Path, given: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    with pytest.raises(ConfigError, match="no memory 'dreams'"):
        run(["piqa"], ["dreams"], model, tokenizer, data, out)
    with pytest.raises(ConfigError, match=r"task medqa \(medicine\) has no bank"):
        run(["medqa"], ["text"], model, tokenizer, data, out, {"law": given[""]})
    with pytest.raises(DataError, match=r"piqa reads piqa\.jsonl\.gz, which is not in --data"):
        choose(["piqa"], data=tmp_path)
    with pytest.raises(ConfigError, match="give the folder it is in with --data"):
        choose(["piqa"], data=None)
    names = SimpleNamespace(task_index={"arc_easy": None}, all_tasks=["arc_easy"])
    monkeypatch.setattr("strata.evals.lm_eval_adapter._manager", lambda **_: names)
    with pytest.raises(ConfigError, match=r"no task 'arc_eazy' .*near to it: arc_easy"):
        run(["piqa", "arc_eazy"], ["none"], model, tokenizer, data, out)
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="humaneval runs code that the model writes"):
        choose(["humaneval"], data=data)
    with pytest.raises(ConfigError, match="no task: give"):
        choose([], data=data)
    model.config.max_position_embeddings = 64
    with pytest.raises(ConfigError, match="exceeds the model's context of 64"):
        run(["gsm8k_zero_shot"], ["none"], model, tokenizer, data, out)
    path = out / "results" / "piqa.none.json"
    path.write_text('{"task": "piqa"}')
    with pytest.raises(DataError, match="is damaged: delete it"):
        run(["piqa"], ["none"], model, tokenizer, data, out)


def test_names_and_groups() -> None:
    assert choose(["gsm8k"], data=None) == [KNOWN["gsm8k"]]
    assert KNOWN["ceval"].source == "ceval-valid"
    assert choose(["humaneval"], data=None, allow_code=True) == [KNOWN["humaneval"]]
    assert choose(["hub_task_unheard_of"], data=None)[0].source == "hub_task_unheard_of"
    own = choose(["mine/town.yaml"], data=None)
    assert own == [Benchmark("town", "general", "", task="mine/town.yaml")]


def test_law_is_two_tasks_in_the_order_of_the_list(data: Path) -> None:
    assert [one.name for one in choose(["law", "medqa", "jecqa"], data=data)] == [
        "medqa", "jecqa", "jecqa_all",
    ]  # fmt: skip


def test_what_is_done_to_rows(data: Path) -> None:
    names = ("hellaswag", "jecqa", "jecqa_all", "halueval_qa", "halueval_general", "halluqa",
             "truthfulqa_mc2", "pubmedqa", "mmlu")  # fmt: skip
    tasks = load_tasks([KNOWN[name].source for name in names], data=data).tasks
    docs = {name: list(tasks[name].task_docs) for name in names}
    assert docs["hellaswag"][0]["question"] == "Trade: A cart comes to Aral. The driver"
    assert len(docs["jecqa"]) == 2 and len(docs["jecqa_all"]) == 5
    sets = tasks["jecqa_all"].doc_to_choice(docs["jecqa_all"][0])
    assert len(sets) == 15 == len(set(sets)) and sets[:6] == ["A", "B", "C", "D", "AB", "AC"]
    answers = [sets[tasks["jecqa_all"].doc_to_target(doc)] for doc in docs["jecqa_all"]]
    assert answers == ["AC", "B", "AC", "D", "AC"]
    assert [doc["made_up"] for doc in docs["halueval_qa"]] == [0, 1] * 5
    assert docs["halueval_qa"][1]["shown"] == "The mayor of Aral is a horse."
    assert [doc["made_up"] for doc in docs["halueval_general"]] == [0, 1, 0, 1]
    assert [doc["response"] for doc in docs["halueval_general"]] == ["salt", "wool", "peat", "rope"]
    assert tasks["halluqa"].doc_to_choice(docs["halluqa"][0]) == ["A", "B"]
    text = tasks["halluqa"].doc_to_text(docs["halluqa"][1])
    assert "\nE. salt from Elm\n" in text
    assert len(docs["pubmedqa"]) == 5 == len(docs["mmlu"])
    scores = [(0.0, True), (0.0, False), (-1e9, False), (0.0, False)]
    share = task_rows.true_share({"mc2_labels": [1, 0, 1, 0]}, scores)
    assert share == {"acc": pytest.approx(1 / 3)}


@pytest.mark.slow
def test_hub_names_are_names_of_the_harness() -> None:
    index = TaskManager().task_index
    hub = [one.source for one in BENCHMARKS if one.file is None]
    assert len(hub) == 8 and not [name for name in hub if name not in index]
