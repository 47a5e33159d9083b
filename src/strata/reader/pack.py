"""A taught reader as a small folder of its own, to be given away.

OUT/model.safetensors, ...   the model in bf16 and its tokenizer, as `strata.models.load` opens them
OUT/reader.json              what it was taught and with which data, how it reads, what it can
OUT/stages.yaml              the settings it was taught by
OUT/made_from.yaml           the settings and sources of the data
OUT/curves.png               what it could meanwhile
OUT/README.md                the same for people
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from strata.config import dump_yaml
from strata.errors import ConfigError, DataError, ModelError
from strata.explicit.settings import ExplicitMemoryConfig
from strata.files import storage_errors
from strata.models import load
from strata.reader.curves import PICTURE_NAME, Look, read_looks, save_curves
from strata.reader.data import ORIGIN_NAME
from strata.reader.exam import REPORT_NAME
from strata.reader.probe import Probe
from strata.reader.stages import Planned, ReaderTraining, memory_of, plan_stages, read_stages
from strata.reader.train import STAGES_NAME, keep_shared, shared_files

CARD_NAME = "reader.json"
MAX_MB = 16  # of the whole folder, so that a package can hold it
_EVERY = ("eval/test/questions.jsonl", "eval/test/bank/references.jsonl")  # beside the shared ones
_MAY_BE = (ORIGIN_NAME, "eval/know/questions.jsonl")


@dataclass(frozen=True)
class Packed:
    """What was packed.

    Attributes:
        folder: the packed reader.
        stage: whose model it is.
        num_parameters: of it.
        num_bytes: of the folder.
        exact: share of validation questions that the packed model answers exactly, by way.
    """

    folder: Path
    stage: str
    num_parameters: int
    num_bytes: int
    exact: dict[str, float]


def pack_reader(run: Path, *, data: Path, out: Path, stage: str | None = None) -> Packed:
    """Write a stage's model in bf16 with all that is to be known of it.

    The validation questions are asked again, for rounding may cost answers.

    Args:
        run: the folder of `strata reader train`.
        data: the folder of `strata reader data` that it was taught with.
        out: a new or empty folder, or one that was packed before, which is replaced.
        stage: whose model; None for the last stage, which must be finished.

    Raises:
        ModelError: that stage is not finished, or its model does not fit `MAX_MB`.
        DataError: data are missing, or others than the run was begun with.
        ConfigError: `out` holds something else.
        StorageError: the disk is full or `out` cannot be written.
    """
    if not (run / STAGES_NAME).is_file():
        raise ModelError(f"no reader in {run}: teach one with strata reader train --out {run}")
    if out.exists() and not (out / CARD_NAME).is_file() and (out.is_file() or any(out.iterdir())):
        raise ConfigError(f"{out} holds something else than a packed reader: give a new --out")
    config = read_stages(run / STAGES_NAME)
    plan = plan_stages(config, data=data, out=run)
    last = _chosen(plan, run, stage)
    keep_shared(run, shared_files(data), data)
    digests = _digests(data, plan[: last.number])
    memory = memory_of(plan, last.number) or ExplicitMemoryConfig()
    looks = [look for look in read_looks(run) if look.number <= last.number]

    model, tokenizer = load(last.model_dir)
    torch.nn.Module.to(model, torch.bfloat16)
    num_parameters = sum(p.numel() for p in model.parameters())
    unfinished = out.with_name(out.name + ".tmp")
    with storage_errors(out):
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        model.save_pretrained(unfinished)
        tokenizer.save_pretrained(unfinished)
    opened, tokenizer = load(unfinished)  # what is asked is what was written
    probe = Probe(data / "eval" / "val", config.probe, known=data / "eval" / "know")
    answers = probe.ask(opened.float(), tokenizer, memory)
    exact = {way: result.exact for way, result in answers.items()}
    card = {
        "stage": last.dir.name,
        "parameters": num_parameters,
        "memory": memory.model_dump(mode="json"),
        "tokens_read": last.tokens_before + last.recipe.run.steps * last.recipe.tokens_per_step,
        "exact": exact,
        "num_questions": len(answers["none"].answers),
        "exam": _exam(run / "exam" / last.dir.name / REPORT_NAME),
        "looks": [_short(look) for look in looks],
        "sha256": {"model.safetensors": _sha256(unfinished / "model.safetensors"), **digests},
    }
    with storage_errors(out):
        text = json.dumps(card, ensure_ascii=False, indent=1)
        (unfinished / CARD_NAME).write_text(text + "\n", encoding="utf-8")
        (unfinished / STAGES_NAME).write_text(dump_yaml(_portable(config)), encoding="utf-8")
        (unfinished / "README.md").write_text(_readme(card), encoding="utf-8")
        if (data / ORIGIN_NAME).is_file():
            shutil.copyfile(data / ORIGIN_NAME, unfinished / ORIGIN_NAME)
        if looks:
            save_curves(looks, unfinished / PICTURE_NAME)
        num_bytes = sum(path.stat().st_size for path in unfinished.rglob("*"))
        if num_bytes > MAX_MB * 10**6:
            shutil.rmtree(unfinished)
            raise ModelError(
                f"{last.model_dir} makes a folder of {num_bytes / 1e6:.1f} MB in bf16, a packed "
                f"reader has at most {MAX_MB}: teach a smaller model, or smaller memory layers"
            )
        if out.exists():
            shutil.rmtree(out)
        unfinished.rename(out)
    return Packed(out, last.dir.name, num_parameters, num_bytes, exact)


def _chosen(plan: Sequence[Planned], run: Path, stage: str | None) -> Planned:
    """The stage to pack."""
    names = [planned.name for planned in plan]
    if stage is not None and stage not in names:
        raise ModelError(f"{run} has no stage {stage!r}: give one of {', '.join(names)}")
    last = plan[-1] if stage is None else plan[names.index(stage)]
    if not last.finished:
        done = [planned.name for planned in plan if planned.finished]
        other = f", or give --stage, one of {', '.join(done)}" if done else ""
        raise ModelError(
            f"stage {last.name} of {run} is not finished: go on with strata reader train{other}"
        )
    return last


def _digests(data: Path, plan: Sequence[Planned]) -> dict[str, str]:
    """sha256 of what the stages were taught and asked with; manifests hold those of their files."""
    names = [*shared_files(data), *_EVERY]
    names += [name for name in _MAY_BE if (data / name).is_file()]
    for planned in plan:
        level = Path(planned.recipe.data.dir).parent.relative_to(data)
        names.append(f"{level}/tokens/manifest.json")
        if planned.memory is not None:
            names.append(f"{level}/references/manifest.json")
    digests = {}
    for name in dict.fromkeys(names):
        if not (data / name).is_file():
            raise DataError(f"no {data / name}: give the --data that the reader was taught with")
        digests[name] = _sha256(data / name)
    return digests


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _exam(path: Path) -> dict[str, Any] | None:
    """What `strata reader eval` found, without the single answers."""
    if not path.is_file():
        return None
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        return {
            by: {name: value for name, value in tree[by].items() if name != "records"}
            for by in ("oracle", "search")
        }
    except (ValueError, KeyError, AttributeError):
        raise DataError(f"{path} is damaged: make it again with strata reader eval") from None


def _short(look: Look) -> dict[str, Any]:
    whole = asdict(look)
    return {name: whole[name] for name in ("stage", "step", "tokens", "loss", "kept", "exact")}


def _portable(config: ReaderTraining) -> ReaderTraining:
    """Without what is a matter of the machine it was taught on."""
    run = {k: v for k, v in config.common.get("run", {}).items() if k not in ("threads", "device")}
    return config.model_copy(update={"common": {**config.common, "run": run}})


def _readme(card: Mapping[str, Any]) -> str:
    shares = " | ".join(f"{share:.1%}" for share in card["exact"].values())
    lines = [
        "# A reader",
        "",
        f"A decoder of {card['parameters'] / 1e6:.1f}M parameters (bf16) that was taught, on "
        f"{card['tokens_read'] / 1e6:.0f}M tokens, to answer from references: as text before the "
        "question, and as explicit memories. Made by `strata reader pack` after `strata reader "
        "train` with `stages.yaml` on the data of `strata reader data`, whose sources and settings "
        "are in `made_from.yaml`; `reader.json` names the data by their sha256. Open it with "
        "`strata.models.load`, ask it with `strata ask`.",
        "",
        f"Answered exactly, of {card['num_questions']} held-out questions, by these weights; "
        "`text_1` and `memory_1` are given the one reference that answers, the others more:",
        "",
        f"| {' | '.join(card['exact'])} |",
        "|" + "---:|" * len(card["exact"]),
        f"| {shares} |",
        "",
    ]
    for by, exam in (card["exam"] or {}).items():
        first = exam["scores"][0]
        given = {"oracle": "the one that answers", "search": "those found in the bank"}[by]
        lines += [
            f"{first['num_questions']} test questions, before rounding to bf16, references given: "
            f"{given} (an answer stands in them for {exam['found']:.1%}):",
            "",
            "| format | answered exactly | KiB a reference |",
            "|---|---:|---:|",
            *(
                f"| {s['format']} | {s['accuracy']:.1%} | {s['kib_per_reference']:.1f} |"
                for s in exam["scores"]
            ),
            "",
        ]
    return "\n".join(lines)
