"""What TRL's losses are when rows read references: those of inference, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny_tune import dpo_rows, sft_rows
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoTokenizer, LogitsProcessor, PreTrainedModel
from trl import DPOConfig, SFTConfig

from strata.errors import ConfigError, DataError
from strata.explicit.attach import attach
from strata.explicit.encode import Encoder
from strata.explicit.hits import Hit
from strata.explicit.host import Host
from strata.explicit.memories import Memories
from strata.explicit.settings import ExplicitMemoryConfig
from strata.layers import value_tables
from strata.models import load
from strata.train.optim import OptimConfig
from strata.train.tune.collate import READS, reads
from strata.train.tune.find import Finder, queries, stretches
from strata.train.tune.recipe import TuneReading
from strata.train.tune.trainers import MemoryDPOTrainer, MemorySFTTrainer

CHUNK = 8
MEMORY = ExplicitMemoryConfig(tokens_per_head=4, reference_tokens=32)
READING = TuneReading(memory=MEMORY, chunk_tokens=CHUNK, top_k=2)
SHELF = [f"House {number} was built by {name}." for number in range(9) for name in ("Ada", "Hana")]

pytestmark = [
    pytest.mark.filterwarnings("ignore:no memory was injected"),  # attach says so
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning"),  # TRL's word
]


class Drawn:
    """A retriever and a source at once: references drawn by the letters of a text."""

    runs_model = False

    def __init__(self, encoder: Encoder | None = None) -> None:
        self.encoder = encoder
        self.asked: list[str] = []

    def search(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        self.asked += queries
        return [self._draw(query)[:top_k] for query in queries]

    find = search

    def _draw(self, query: str) -> list[Hit]:
        number = sum(map(ord, query))
        return [
            Hit(str(at), 1.0 - at / 100, SHELF[at], "shelf", 0, 1, {})
            for at in {number % 18, (number + 5) % 18}
        ][: number % 3]

    def load(self, ids: Sequence[str]) -> Memories:
        assert self.encoder is not None
        return self.encoder.encode([SHELF[int(name)] for name in ids])


class Always:
    """A source that finds the same references for any text."""

    def __init__(self, encoder: Encoder, texts: Sequence[str]) -> None:
        self.encoder, self.texts = encoder, list(texts)

    def find(self, queries: Sequence[str], top_k: int) -> list[list[Hit]]:
        hits = [Hit(str(n), 1.0, text, "row", 0, 1, {}) for n, text in enumerate(self.texts)]
        return [hits for _ in queries]

    def load(self, ids: Sequence[str]) -> Memories:
        return self.encoder.encode([self.texts[int(name)] for name in ids])


class Dictated(LogitsProcessor):
    """Makes `generate` write what it is told to."""

    def __init__(self, prompt: int, ids: Sequence[int]) -> None:
        self.prompt, self.ids = prompt, list(ids)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.ids[input_ids.shape[1] - self.prompt]] = 0
        return forced


def make_trainer(
    kinds: tuple[Any, Any],
    folder: Path,
    rows: list[dict[str, Any]],
    settings: dict[str, Any],
    *,
    reading: TuneReading | None = READING,
    retriever: Drawn | None = None,
    **options: Any,
) -> Any:
    """A trainer of a saved model, (trainer, TRL's settings) of a kind."""
    model, tokenizer = load(folder)
    finder = None
    if retriever is not None:
        finder = Finder(retriever, tokenizer, chunk_tokens=CHUNK, top_k=2)
    trainer, config = kinds
    common = {
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "max_length": 60,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
    }
    return trainer(
        model,
        args=config(**{**common, **settings}),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        reading=reading,
        finder=finder,
        **options,
    )


def sft_trainer(
    folder: Path,
    rows: list[dict[str, Any]],
    *,
    settings: dict[str, Any] | None = None,
    **options: Any,
) -> MemorySFTTrainer:
    own = {"output_dir": str(folder.parent / "sft"), "per_device_train_batch_size": 4}
    kinds = (MemorySFTTrainer, SFTConfig)
    return make_trainer(kinds, folder, rows, {**own, **(settings or {})}, **options)


def dpo_trainer(folder: Path, rows: list[dict[str, Any]], **options: Any) -> MemoryDPOTrainer:
    own = {"output_dir": str(folder.parent / "dpo"), "beta": 0.3}
    return make_trainer((MemoryDPOTrainer, DPOConfig), folder, rows, own, **options)


def batch_of(trainer: Any, at: Sequence[int]) -> dict[str, Any]:
    batch = trainer.data_collator([trainer.train_dataset[number] for number in at])
    return {name: value for name, value in batch.items()}


def written(
    model: PreTrainedModel, tokenizer: Any, source: Any, prompt: list[int], completion: list[int]
) -> Tensor:
    """Log-likelihood of each completion token while `generate` writes it, memory attached."""
    with attach(model, source, tokenizer=tokenizer, config=MEMORY, chunk_tokens=CHUNK, top_k=2):
        out = model.generate(
            torch.tensor([prompt]),
            max_new_tokens=len(completion),
            do_sample=False,
            eos_token_id=-1,
            pad_token_id=1,
            output_logits=True,
            return_dict_in_generate=True,
            logits_processor=[Dictated(len(prompt), completion)],
        )
    assert out.sequences[0, len(prompt) :].tolist() == completion
    logps = torch.cat(out.logits).log_softmax(-1)
    return logps.gather(1, torch.tensor(completion)[:, None])[:, 0]


LONG = [
    {"prompt": "Where is Ada, and who built house 7?", "completion": " In Accra, by Hana herself."},
    {"prompt": "Who?", "completion": " Chidi, who lives in Cusco, built it."},
    {"prompt": "Say a word.", "completion": " Bergen"},
]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_training_reads_what_generation_reads(tiny_model: Path, checkpointing: bool) -> None:
    """Prompts and completions of several pieces, each with references of its own, or none."""
    retriever = Drawn()
    trainer = sft_trainer(tiny_model, LONG, retriever=retriever)
    rows = [trainer.train_dataset[number] for number in range(3)]
    assert max(len(row["pieces"]) for row in rows) > 5
    assert any(not piece for row in rows for piece in row["pieces"])
    assert any(len(piece) == 2 for row in rows for piece in row["pieces"])
    model, tokenizer = trainer.model, trainer.processing_class
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    together = trainer.compute_loss(model, batch_of(trainer, range(3)))
    if checkpointing:
        together.backward()
        model.gradient_checkpointing_disable()
    model.eval()
    source = Drawn(Encoder(Host(model), tokenizer, MEMORY))
    found = []
    for row in rows:
        prompt = sum(label == -100 for label in row["labels"])
        ids = row["input_ids"]
        found.append(written(model, tokenizer, source, ids[:prompt], ids[prompt:]))
    assert set(retriever.asked) == set(source.asked)
    want = -torch.cat(found).mean()
    torch.testing.assert_close(together.detach(), want, atol=2e-5, rtol=2e-5)
    without = trainer.compute_loss(
        model, {k: v for k, v in batch_of(trainer, range(3)).items() if k != READS}
    )
    assert abs(float(without.detach()) - float(want)) > 1e-2


def test_named_references_are_read_by_the_whole_row(tiny_model: Path) -> None:
    rows = [{**LONG[0], "references": SHELF[:2]}, {**LONG[1], "references": [SHELF[5]]}]
    trainer = sft_trainer(tiny_model, rows)
    model, tokenizer = trainer.model.eval(), trainer.processing_class
    loss = trainer.compute_loss(model, batch_of(trainer, range(2)))
    encoder = Encoder(Host(model), tokenizer, MEMORY)
    found = []
    for number, row in enumerate(rows):
        labels = trainer.train_dataset[number]["labels"]
        prompt = sum(label == -100 for label in labels)
        ids = trainer.train_dataset[number]["input_ids"]
        source = Always(encoder, row["references"])
        found.append(written(model, tokenizer, source, ids[:prompt], ids[prompt:]))
    want = -torch.cat(found).mean()
    torch.testing.assert_close(loss.detach(), want, atol=2e-5, rtol=2e-5)


def log_probs(trainer: Any, batch: dict[str, Any], *, fused: bool = True) -> Tensor:
    with trainer._reads(batch) as plain:
        out: Tensor = trainer.model(**plain, fused_lm_head=fused).log_probs
        return out


@pytest.mark.parametrize("found", [False, True], ids=["named", "found"])
def test_rows_of_a_batch_do_not_meet(tiny_model: Path, found: bool) -> None:
    """Rows with references, without, and with several: each as if alone."""
    if found:
        trainer = sft_trainer(tiny_model, LONG, retriever=Drawn())
    else:
        named = [{**row, "references": SHELF[:number]} for number, row in enumerate(LONG)]
        trainer = sft_trainer(tiny_model, named)
    trainer.model.eval()
    together = log_probs(trainer, batch_of(trainer, range(3)))
    for number in range(3):
        batch = batch_of(trainer, [number])
        alone = log_probs(trainer, batch)
        mine = together[number : number + 1, : alone.shape[1]]
        torch.testing.assert_close(mine, alone, atol=2e-5, rtol=2e-5)
        if not found and number == 0:
            batch.pop(READS)
            assert torch.equal(log_probs(trainer, batch), alone)  # the plain decoder, bit for bit


def test_loss_falls_on_completions_only(tiny_model: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    plain = sft_trainer(tiny_model, sft_rows(4), reading=None)
    for row, given in zip(plain.train_dataset, sft_rows(4), strict=True):
        taught = [token for token in row["labels"] if token != -100]
        assert tokenizer.decode(taught) == given["completion"] + "<eos>"
        assert tokenizer.decode(row["input_ids"][: -len(taught)]) == given["prompt"]
        assert row["labels"][-len(taught) :] == taught


def test_the_default_chat_template_teaches_answers_only(tiny_model: Path) -> None:
    from strata.train.tune.template import ensure_chat_template

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert ensure_chat_template(tokenizer) and not ensure_chat_template(tokenizer)
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Where?"},
        {"role": "assistant", "content": "Accra"},
        {"role": "user", "content": "Sure?"},
    ]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (
        "System: Be brief.\nUser: Where?\nAssistant: Accra<eos>\nUser: Sure?\nAssistant:"
    )
    args = SFTConfig(output_dir=str(tiny_model / "x"), use_cpu=True, bf16=False, report_to="none")
    trainer = MemorySFTTrainer(
        load(tiny_model)[0],
        args=args,
        train_dataset=Dataset.from_list(sft_rows(3, chat=True)),
        processing_class=tokenizer,
    )
    for row, given in zip(trainer.train_dataset, sft_rows(3), strict=True):
        taught = [token for token in row["labels"] if token != -100]
        assert tokenizer.decode(taught) == given["completion"] + "<eos>\n"
        assert tokenizer.decode(row["input_ids"]).startswith(f"User: {given['prompt']}\nAssistant:")


def test_gradients_reach_what_memories_are_written_with(tiny_model: Path) -> None:
    """Along the part that comes through the encoding, the loss rises as the gradient says.

    All tokens are kept, lest a step choose others, and weights are float64.
    """
    whole = MEMORY.model_copy(update={"tokens_per_head": 32})
    rows = [{**row, "references": SHELF[:2]} for row in LONG]
    grads = []
    for detach in (True, False):
        reading = READING.model_copy(update={"memory": whole, "detach": detach})
        trainer = sft_trainer(tiny_model, rows, reading=reading)
        model = trainer.model.double()
        batch = batch_of(trainer, range(3))
        weight = model.model.layers[0].self_attn.k_proj.weight
        trainer.compute_loss(model, batch).backward()
        grads.append(weight.grad.clone())
    through = grads[1] - grads[0]
    length = through.norm()
    step, losses = 1e-3 * through / length, []
    with torch.no_grad():
        for sign in (1, -1):
            weight.add_(sign * step)
            losses.append(trainer.compute_loss(model, batch))
            weight.sub_(sign * step)
    slope = (losses[0] - losses[1]) / 2e-3
    for grad, off in ((grads[1], 0), (grads[0], 1)):  # detached, it is off by just this part
        said = (grad * through).sum() / length
        assert float((slope - said) / length) == pytest.approx(off, abs=0.05)


def answer_logps(
    model: PreTrainedModel, tokenizer: Any, row: dict[str, Any], answer: str
) -> Tensor:
    """Of one answer, by a direct call with memory attached."""
    ids = row["prompt_ids"] + row[answer]
    source = Always(Encoder(Host(model), tokenizer, MEMORY), row["references"])
    with torch.no_grad(), attach(model, source, tokenizer=tokenizer, config=MEMORY):
        logits = model(torch.tensor([ids])).logits[0]
    logps = logits[:-1].log_softmax(-1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
    return logps[len(row["prompt_ids"]) - 1 :].sum()


def test_margins_are_those_of_the_formula(tiny_model: Path) -> None:
    trainer = dpo_trainer(tiny_model, dpo_rows(4))
    policy, reference = trainer.model, trainer.ref_model
    with torch.no_grad():  # else all margins are 0
        for parameter in policy.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    policy.eval()
    with torch.no_grad():
        loss = trainer.compute_loss(policy, batch_of(trainer, range(4)))
    tokenizer = trainer.processing_class
    margins = []
    for row in trainer.train_dataset:
        ratio = {
            answer: answer_logps(policy, tokenizer, row, answer)
            - answer_logps(reference, tokenizer, row, answer)
            for answer in ("chosen_ids", "rejected_ids")
        }
        margins.append(0.3 * (ratio["chosen_ids"] - ratio["rejected_ids"]))
    want = torch.stack(margins)
    assert float(want.abs().min()) > 1e-3
    (said,) = trainer._metrics["eval"]["rewards/margins"]
    assert said == pytest.approx(float(want.mean()), abs=2e-5)
    assert float(loss) == pytest.approx(float(-F.logsigmoid(want).mean()), abs=2e-5)


def test_both_answers_and_both_models_read_the_same(tiny_model: Path) -> None:
    rows = [{k: v for k, v in row.items() if k != "references"} for row in dpo_rows(3)]
    retriever = Drawn()
    trainer = dpo_trainer(tiny_model, rows, retriever=retriever)
    batch = batch_of(trainer, range(3))
    read = batch[READS]
    half = len(read.index_bcr) // 2
    assert read.texts and torch.equal(read.index_bcr[:half], read.index_bcr[half:])
    assert read.held_bcnr is None or torch.equal(read.held_bcnr[:half], read.held_bcnr[half:])
    prompts = {row["prompt"] for row in rows}
    assert all(any(text in prompt for prompt in prompts) for text in retriever.asked)
    assert len(trainer._steps) == 2
    trainer.compute_loss(trainer.model, batch).backward()
    assert all(parameter.grad is None for parameter in trainer.ref_model.parameters())


@pytest.mark.parametrize("prompt", [1, 7, 8, 9, 20])
@pytest.mark.parametrize("completion", [0, 1, 8, 9, 30])
def test_pieces_cover_a_row_as_generation_does(prompt: int, completion: int) -> None:
    asked = queries(prompt, completion, CHUNK)
    parts = stretches(prompt, len(asked), CHUNK, prompt + completion + 3)
    columns = [at for start, stop in parts for at in range(start, stop)]
    assert columns == list(range(prompt + completion + 3))
    for column in range(prompt + completion):
        (number,) = (n for n, (start, stop) in enumerate(parts) if start <= column < stop)
        if column < prompt + CHUNK or completion == 0:
            end = prompt - (prompt - 1 - min(column, prompt - 1)) // CHUNK * CHUNK
        else:
            end = prompt + (column - prompt) // CHUNK * CHUNK
        assert asked[number] == (max(0, end - CHUNK), end)


def test_a_batch_that_reads_nothing(tiny_model: Path) -> None:
    trainer = sft_trainer(tiny_model, [{**row, "references": []} for row in LONG])
    batch = batch_of(trainer, range(3))
    loss = trainer.compute_loss(trainer.model, dict(batch))
    batch.pop(READS)
    assert torch.equal(loss, trainer.compute_loss(trainer.model, batch))
    empty = reads([{"references": None, "labels": [1]}], width=9, chunk=4)
    assert empty.texts == [] and empty.index_bcr.shape == (1, 1, 0)


def test_value_tables_are_stepped_by_their_own_optimizer(tiny_memory_model: Path) -> None:
    """With TRL's optimizer or ours for the dense part; at the same point of one schedule."""
    for optim in (None, OptimConfig(lr=1e-3, value_lr=1e-2)):
        trainer = sft_trainer(
            tiny_memory_model,
            sft_rows(16),
            optim=optim,
            settings={"max_steps": 4, "learning_rate": 1e-3, "warmup_steps": 2,
                      "save_strategy": "no"},
        )  # fmt: skip
        (table,) = value_tables(trainer.model).values()
        before = table.weight.detach().clone()
        trainer.train()
        rows = trainer.row_optimizer
        assert rows is not None and rows.state_dict()["steps"] == 4
        assert rows.rows_updated > 0 and table.weight.grad is None
        changed = (table.weight != before).any(1)
        assert changed.any()
        state = trainer.optimizer.state
        assert not any(parameter is table.weight for parameter in state)
        # warmup of 2, then linear to 0 after 4: the last step is taken at half of the peak
        peak = 1e-3 if optim is None else optim.value_lr
        assert rows.param_groups[0]["lr"] == pytest.approx(peak / 2)


def test_frozen_tables_stay(tiny_memory_model: Path) -> None:
    trainer = sft_trainer(
        tiny_memory_model, sft_rows(8), settings={"max_steps": 2, "save_strategy": "no"}
    )
    (table,) = value_tables(trainer.model).values()
    table.weight.requires_grad_(False)
    before = table.weight.clone()
    trainer.train()
    assert trainer.row_optimizer is None and torch.equal(table.weight, before)


def test_adapters_read_too(tiny_model: Path) -> None:
    lora = LoraConfig(r=4, target_modules=["k_proj", "v_proj"], task_type="CAUSAL_LM")
    rows = [{**row, "references": SHELF[:2]} for row in LONG]
    trainer = sft_trainer(tiny_model, rows, peft_config=lora)
    loss = trainer.compute_loss(trainer.model, batch_of(trainer, range(3)))
    plain = sft_trainer(tiny_model, rows)
    torch.testing.assert_close(loss, plain.compute_loss(plain.model, batch_of(plain, range(3))))
    loss.backward()
    grads = [p.grad for n, p in trainer.model.named_parameters() if "lora_B" in n]
    assert grads and all(grad is not None and grad.abs().sum() > 0 for grad in grads)
    preferring = dpo_trainer(tiny_model, dpo_rows(3), peft_config=lora)
    preferring.compute_loss(preferring.model, batch_of(preferring, range(3))).backward()
    with pytest.raises(ConfigError, match="give ref_model"):
        MemoryDPOTrainer(trainer.model, args=preferring.args, reading=READING)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"packing": True}, "packing cannot go with references"),
        ({"padding_free": True, "max_length": None}, "padding_free cannot go"),
        ({"truncation_mode": "keep_end"}, "must be 'keep_start'"),
    ],
)
def test_what_memory_cannot_follow(
    tiny_model: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        sft_trainer(tiny_model, sft_rows(3), settings=settings)


def test_rows_that_fill_a_row_with_their_prompt(tiny_model: Path) -> None:
    with pytest.raises(DataError, match="none of 3 rows is left"):
        sft_trainer(tiny_model, [{**row, "prompt": "Where? " * 60} for row in LONG])


def test_nothing_is_left_on_the_model(tiny_model: Path) -> None:
    trainer = sft_trainer(tiny_model, sft_rows(4))
    trainer.compute_loss(trainer.model, batch_of(trainer, range(4)))
    host = Host(trainer.model)
    assert not any(hasattr(attention, "_strata_attend") for attention in host.attentions)
