"""The arms of `reading_study.py`: tables of settings, and what they come to."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from strata.config import apply_override, validate
from strata.models import ModelConfig
from strata.reader.stages import ReaderTraining, plan_stages, read_stages

Keys = Mapping[str, Any]

# Rows of a batch and their tokens: 4,096 token positions a step at every level.
STEP_TOKENS = 4096
SHAPES = {
    "text/level1": (32, 128),
    "text/level2": (16, 256),
    "text/level4": (8, 512),
    "memory/level1": (32, 128),
    "memory/level2": (16, 256),
    "memory/level3": (8, 512),
}
DENSE = {"selector": "all"}
KEEPS = {"selector": "expected", "tokens_per_head": 64}  # as the reader's memory1

# Stages. The level of each part by arm; the rate and its last share by part, the same for all.
T1, T2, T4 = "text/level1", "text/level2", "text/level4"
M1, M2, M3 = "memory/level1", "memory/level2", "memory/level3"
STAGES = {
    "from_start": (M1, M1, M2, M2, M3, M3),
    "text_first": (T1, T2, T4, M1, M2, M3),
    "text_only": (T1, T2, T4, T4, T4, T4),
}
RATES = ((1e-3, 0.5), (1e-3, 0.5), (7e-4, 0.5), (5e-4, 0.5), (5e-4, 0.5), (5e-4, 0.05))
ROWS_OF_STAGES = {"text": T4, "memory": M3}

# Ablations. Arms by name: keys of `strata reader train`, or `data.` and a key of `strata reader
# data`; all others are the reader's choices. Arms that come to the same are run once.
SELECTOR, KEPT = "stages.arm.selector", "stages.arm.tokens_per_head"
LAYERS, REACH = "common.reading.memory.layers", "common.reading.reach"
MARKER, POSITIONS = "common.reading.memory.marker", "common.reading.memory.positions"
DETACH, QUERY, WAYS = "common.reading.detach", "common.reading.query", "probe.ways"
CHUNK, BACK = "data.chunk_tokens", "data.reach"
FEW = 32  # tokens a head, so that it matters which
ASKED = ["none", "text_5", "memory_1", "memory_5"]
ABLATIONS: dict[str, dict[str, Keys]] = {
    "tokens_per_head": {
        **{str(kept): {SELECTOR: "expected", KEPT: kept} for kept in (1, 2, 4, 8, 16, 32, 64)},
        "all": {SELECTOR: "all"},
    },
    # Of a depth that the model says.
    "layers": {
        "first_half": {LAYERS: "first"},
        "middle_half": {LAYERS: "middle"},
        "last_half": {LAYERS: "last"},
        "all": {LAYERS: "all"},
        "last": {LAYERS: "top"},
    },
    "references": {
        "1": {REACH: 1},
        "2": {REACH: 2, WAYS: [*ASKED, "memory_2"]},
        "3": {REACH: 3, WAYS: [*ASKED, "memory_3"]},
        "5": {REACH: 5},
        "10": {REACH: 10, WAYS: [*ASKED, "memory_10"]},
    },
    # Five chunks are read, `data.reach` of them are asked about: the others are for lines that go
    # on behind their chunk, 64 tokens and more.
    "interval": {
        "16": {CHUNK: 16, BACK: 1},
        "32": {CHUNK: 32, BACK: 3},
        "64": {CHUNK: 64, BACK: 4},
        "128": {CHUNK: 128, BACK: 4},
    },
    "positions": {
        "parallel": {POSITIONS: "parallel"},
        "sequential": {POSITIONS: "sequential"},
    },
    "marker": {
        "reference": {MARKER: "<s>Reference:"},
        "beginning_only": {MARKER: "<s>"},
        "none": {MARKER: ""},
    },
    "gradient": {
        "through_encoding": {DETACH: False},
        "detached": {DETACH: True},
    },
    "query": {
        "own_chunk": {QUERY: "own"},
        "previous_chunk": {QUERY: "previous"},
    },
    "selectors": {
        **{
            name: {SELECTOR: name, KEPT: FEW}
            for name in ("attention", "key_norm", "reconstruction", "expected", "random")
        },
        "all": {SELECTOR: "all"},
    },
}
# What the texts make of some of them; stands above their tables.
NOTES = {
    "references": "Rows ask about the references of their chunk and three before, and have eight "
    "chunks at the last level: who reads fewer cannot know some answers, and no row has ten. "
    "memory_N gives N in any case.",
    "interval": "Each interval has rows of its own, laid out on its chunks. They ask about as many "
    "chunks back as leaves 64 tokens for a line to end in, so five chunks of 16 tokens hold fewer "
    "references than five of 64 (read by a chunk). Questions are one piece at any interval.",
    "query": "Rows ask about the reference of their own chunk first, which is read one chunk late "
    "where the previous one asks. Questions read what they are given from their first token on.",
}
TRAINED_ONLY = ("gradient",)  # nothing to a model that only reads


@dataclass(frozen=True)
class Arm:
    """A run of a study.

    Attributes:
        name: "text_first", or "layers/all".
        folder: of its runs; arms of the same settings share it.
        tree: of a `ReaderTraining`, without its seed.
        data_keys: of `ReaderData`, that differ from those of the study's texts.
    """

    name: str
    folder: str
    tree: Mapping[str, Any]
    data_keys: Mapping[str, Any]

    @property
    def study(self) -> str:
        """The ablation that it belongs to; its own name in other studies."""
        return self.name.split("/")[0]

    def config(self, seed: int) -> ReaderTraining:
        """Its settings.

        Raises:
            ConfigError: a key or value that is not allowed.
        """
        tree = copy.deepcopy(dict(self.tree))
        tree["common"]["seed"] = seed
        return validate(ReaderTraining, tree, origin=f"arm {self.name}")


def stage_arms(*, tokens: int, overrides: Sequence[str] = ()) -> list[Arm]:
    """Arms that see equally many tokens, in parts of equal length.

    Args:
        tokens: of each arm, about: whole steps in each part.
        overrides: `a.b=c`, of all arms.

    Raises:
        ConfigError: an override that is none.
    """
    steps = max(1, round(tokens / len(RATES) / STEP_TOKENS))
    arms = []
    for name, levels in STAGES.items():
        own = read_stages()
        tree: dict[str, Any] = {
            "model": own.model.model_dump(mode="json"),
            "memory": None,
            "common": copy.deepcopy(own.common),
            "probe": own.probe.model_dump(mode="json"),
            "stages": {},
        }
        for number, (level, (lr, ratio)) in enumerate(zip(levels, RATES, strict=True), start=1):
            kept = DENSE if level.startswith("memory/") else {}
            tree["stages"][f"part{number}"] = stage(level, steps, lr=lr, min_ratio=ratio) | kept
        memory = tree["common"]["reading"]["memory"]
        for override in overrides:
            apply_override(tree, override)
        depth = tree["model"]["host"]["num_hidden_layers"]
        memory.setdefault("layers", some_layers("last", depth))
        # What an arm without memories is asked with, too.
        tree["probe"]["memory"] = memory | DENSE | (tree["probe"].get("memory") or {})
        arms.append(Arm(name, name, tree, {}))
    return arms


def ablation_arms(
    *,
    model: Path,
    num_layers: int,
    level: str,
    steps: int,
    lr: float,
    made_with: Mapping[str, Any],
    overrides: Sequence[str] = (),
) -> list[Arm]:
    """The reader's own choices, then each arm of each ablation.

    Args:
        model: that all begin with.
        num_layers: of it.
        level: of all texts.
        steps, lr: of each arm.
        made_with: settings of the study's texts, as of `ReaderData`.
        overrides: `a.b=c`, of all arms; an arm's own keys win.

    Raises:
        ConfigError: an override that is none, or settings that no run can follow.
    """
    owners: dict[str, str] = {}
    arms = []
    for name, keys in _all_named():
        own = read_stages()
        tree: dict[str, Any] = {
            "model": ModelConfig(path=str(model.absolute())).model_dump(mode="json"),
            "memory": None,
            "common": copy.deepcopy(own.common),
            "probe": own.probe.model_dump(mode="json") | {"every": None, "ways": ASKED},
            "stages": {"arm": stage(level, steps, lr=lr, min_ratio=0.1) | KEEPS},
        }
        tree["common"]["reading"]["memory"]["layers"] = some_layers("top", num_layers)
        for override in overrides:
            apply_override(tree, override)
        texts = {}
        for key, value in keys.items():
            if key.startswith("data."):
                texts[key.removeprefix("data.")] = value
                continue
            if key == LAYERS:
                value = some_layers(value, num_layers)
            apply_override(tree, f"{key}={json.dumps(value)}")
        texts = {key: value for key, value in texts.items() if made_with.get(key) != value}
        arm = Arm(name, name.replace("/", "-"), tree, texts)
        arms.append(replace(arm, folder=owners.setdefault(_comes_to(arm), arm.folder)))
    return arms


def _all_named() -> Iterator[tuple[str, Keys]]:
    yield "base", {}
    for study, arms in ABLATIONS.items():
        yield from ((f"{study}/{name}", keys) for name, keys in arms.items())


def _comes_to(arm: Arm) -> str:
    """The same for arms that differ in nothing but how they say it."""
    config = arm.config(0)
    (planned,) = plan_stages(config, data=Path("data"), out=Path("out"))
    recipe = planned.recipe.model_dump(mode="json")
    return json.dumps([recipe, config.probe.asked, dict(arm.data_keys)], sort_keys=True)


def some_layers(which: str, num_layers: int) -> list[int] | None:
    """Layers of a half, as many as the first one has, the top one, or all; None for the first.

    None is the default of `ExplicitMemoryConfig`.
    """
    if which == "first":
        return None
    half = (num_layers + 1) // 2
    count = {"all": num_layers, "top": 1}.get(which, half)
    first = (num_layers - count) // 2 if which == "middle" else num_layers - count
    return list(range(first, first + count))


def stage(level: str, steps: int, *, lr: float, min_ratio: float) -> dict[str, Any]:
    """A stage on a level, in batches of the usual shape."""
    batch_size, sequence_tokens = SHAPES[level]
    return {
        "level": level,
        "steps": steps,
        "batch_size": batch_size,
        "sequence_tokens": sequence_tokens,
        "lr": lr,
        "warmup": min(100, steps // 10),
        "min_ratio": min_ratio,
    }
