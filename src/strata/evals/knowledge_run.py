"""A probe of many facts in a folder, gone on with where it was.

OUT/probe.json      what is probed: model, memories, facts
OUT/facts.jsonl     a line a fact, written as they are done
OUT/knowledge.json  the figures over all facts, once all are done
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from strata.errors import ConfigError, DataError
from strata.evals.facts import Fact
from strata.evals.knowledge import KnowledgeProbe, KnowledgeSummary, ProbedFact, summarise
from strata.evals.scoring import Progress
from strata.explicit.fingerprint import fingerprint
from strata.explicit.settings import ExplicitMemoryConfig
from strata.files import replace_text, storage_errors

PROBE_NAME = "probe.json"
FACTS_NAME = "facts.jsonl"
SUMMARY_NAME = "knowledge.json"
_TOGETHER = 128  # facts done between two writes


def run_probe(
    model: PreTrainedModel,
    tokenizer: Any,
    facts: Sequence[Fact],
    *,
    out: Path,
    config: ExplicitMemoryConfig,
    named: str,
    batch_size: int = 32,
    progress: Progress | None = None,
) -> KnowledgeSummary:
    """Probe facts into a folder; those that stand there already are not probed again.

    Args:
        model, tokenizer, facts, config, batch_size: as in `KnowledgeProbe`.
        out: the folder; its parents are made.
        named: what to call the model in the record.
        progress: told of the facts done.

    Raises:
        ConfigError: the folder holds a probe of something else.
        DataError: facts that cannot be probed (see `KnowledgeProbe`), or a record was changed.
        StorageError: the disk is full.
    """
    probe = KnowledgeProbe(model, tokenizer, facts, config=config, batch_size=batch_size)
    told = [asdict(fact) for fact in facts]
    settings = {
        "model": named,
        "num_facts": len(facts),
        "facts_sha256": hashlib.sha256(json.dumps(told).encode()).hexdigest(),
        "memory": config.model_dump(mode="json"),
        "fingerprint": fingerprint(model, tokenizer, config, probe.shape).model_dump(mode="json"),
    }
    with storage_errors(out):
        out.mkdir(parents=True, exist_ok=True)
        done = _begun(out, settings)
        left = [fact for fact in facts if fact.id not in done]
        with (out / FACTS_NAME).open("a", encoding="utf-8") as file:
            for begin in range(0, len(left), _TOGETHER):
                for fact in probe.probe(left[begin : begin + _TOGETHER]):
                    done[fact.id] = fact
                    file.write(json.dumps(asdict(fact), ensure_ascii=False) + "\n")
                file.flush()
                if progress is not None:
                    progress(len(done), len(facts))
        summary = summarise([done[fact.id] for fact in facts])
        text = json.dumps(asdict(summary), ensure_ascii=False, indent=1)
        replace_text(out / SUMMARY_NAME, text + "\n")
    return summary


def _begun(out: Path, settings: dict[str, Any]) -> dict[str, ProbedFact]:
    """What was done before, after a check that it was this probe."""
    path = out / PROBE_NAME
    if not path.exists():
        if (out / FACTS_NAME).exists():
            raise ConfigError(f"{out} holds facts of no probe: give another --out")
        replace_text(path, json.dumps(settings, indent=1) + "\n")
        return {}
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        differing = [key for key in settings if key != "model" and kept[key] != settings[key]]
    except (ValueError, TypeError, KeyError):
        raise DataError(f"{path} is damaged: give another --out, or delete the folder") from None
    if differing:
        what = {"fingerprint": "model", "memory": "memory settings"}.get(differing[0], "facts")
        raise ConfigError(
            f"{out} holds a probe with other {what}: give another --out, or delete the folder"
        )
    return _read_facts(out / FACTS_NAME)


def _read_facts(path: Path) -> dict[str, ProbedFact]:
    """Facts of the record; the line that a kill cut off goes."""
    if not path.exists():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    whole, _, cut_off = text.rpartition("\n")
    if cut_off:
        replace_text(path, whole + "\n" if whole else "")
    try:
        facts = [ProbedFact(**json.loads(line)) for line in whole.split("\n") if line]
        good = all(_are_probabilities(fact) for fact in facts)
    except (ValueError, TypeError, AttributeError):
        good = False
    if not good:
        raise DataError(f"{path} is damaged: give another --out, or delete the folder")
    return {fact.id: fact for fact in facts}


def _are_probabilities(fact: ProbedFact) -> bool:
    rows = [fact.alone, *fact.text.values(), *fact.explicit.values()]
    return all(row and all(0 <= p <= 1 and not math.isnan(p) for p in row) for row in rows)
