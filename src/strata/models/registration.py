"""strata models as ordinary transformers models: saved, opened and named by the Auto classes.

For each host class such as `LlamaForCausalLM` there is a subclass `StrataLlamaForCausalLM` whose
configuration carries `memory_layers`, `expert_layers` or both and has the model type
`strata_llama`.
Everything else (generate, caches, attention, PEFT, gradient checkpointing) is the host's own.

A saved folder must never be half-loaded by a program that has not imported strata: its model type
is unknown to the Auto classes, and `vocab_size` is sealed in the JSON so that the host's own
configuration refuses it too.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from strata.errors import ConfigError, ModelError
from strata.layers import (
    ExpertsConfig,
    MakeTable,
    MappedTable,
    MemoryLayerConfig,
    insert_experts,
    insert_memory,
    value_tables,
)
from strata.layers.collectives import Group
from strata.layers.install import TABLES

HOSTS: dict[str, str] = {
    "llama": "LlamaForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "mistral": "MistralForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "gemma3": "Gemma3ForCausalLM",
    "olmo2": "Olmo2ForCausalLM",
}
_SEALED = "vocab_size"
_SEAL = "needs strata: pip install strata-lm, then import strata"

# Parameters and buffers of value tables, by their names in a saved folder.
STORED_TABLE = rf"(^|\.){TABLES}\.(\d+)\.(weight|codes|scales)$"

# Where models that are being opened take their value tables from; None: from the folder.
_make_table: ContextVar[MakeTable | None] = ContextVar("make_table", default=None)

_strata_classes: dict[type[PreTrainedModel], type[PreTrainedModel]] = {}
_strata_configs: dict[type[PreTrainedConfig], type[PreTrainedConfig]] = {}


class MemoryConfigMixin:
    """The configuration side: two more fields, sealed on disk."""

    memory_layers: dict[str, Any] | None = None
    expert_layers: dict[str, Any] | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        sealed = config_dict.get(_SEALED)
        if isinstance(sealed, dict):
            config_dict = {**config_dict, _SEALED: sealed["value"]}
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]

    def to_json_file(self, json_file_path: str | Path, use_diff: bool = True) -> None:
        tree = json.loads(self.to_json_string(use_diff=use_diff))  # type: ignore[attr-defined]
        for name in ("memory_layers", "expert_layers"):
            if tree.get(name, ...) is None:  # as it is on disk where a config was opened from there
                del tree[name]
        tree[_SEALED] = {_SEAL: True, "value": self.vocab_size}  # type: ignore[attr-defined]
        text = json.dumps(tree, indent=2, sort_keys=True) + "\n"
        Path(json_file_path).write_text(text, encoding="utf-8")


class MemoryModelMixin:
    """The model side: built with its memory, and opened whole or not at all."""

    def __init__(self, config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        if config.expert_layers:
            insert_experts(self, ExpertsConfig.model_validate(config.expert_layers))  # type: ignore[arg-type]
        elif not config.memory_layers:
            raise ModelError(f"{type(config).__name__} without memory_layers: build the host class")
        if not config.memory_layers:
            return
        memory = MemoryLayerConfig.model_validate(config.memory_layers)
        # Freezing belongs to the training run that asked for it, not to everyone who opens it.
        memory = memory.model_copy(update={"freeze_base": False})
        make_table = _make_table.get()
        insert_memory(self, memory, make_table=make_table)  # type: ignore[arg-type]
        if make_table is not None:  # the file's own tables are then nobody's
            ignored = getattr(self, "_keys_to_ignore_on_load_unexpected", None)
            self._keys_to_ignore_on_load_unexpected = {*(ignored or ()), STORED_TABLE}

    def save_pretrained(self, *args: Any, **kwargs: Any) -> Any:
        """As in transformers; a model with mapped tables does not hold what would be saved."""
        mapped = [t for t in value_tables(self).values() if isinstance(t, MappedTable)]  # type: ignore[arg-type]
        if mapped:
            raise ModelError(
                f"the rows of this model are mapped from {mapped[0].place.path}: copy that folder, "
                "or open the model without mapping and save it"
            )
        return super().save_pretrained(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, but a folder that lacks a weight is refused, not filled at random."""
        wants_info = kwargs.pop("output_loading_info", False)
        model, info = super().from_pretrained(*args, output_loading_info=True, **kwargs)  # type: ignore[misc]
        missing = sorted(info["missing_keys"])
        if missing:
            raise ModelError(
                f"{args[0] if args else 'the folder'} lacks {len(missing)} weights of "
                f"{cls.__name__}, first {missing[0]}: copy or save it again"
            )
        return (model, info) if wants_info else model


@contextmanager
def tables_from(make_table: MakeTable) -> Iterator[None]:
    """While open, models are built with these value tables, and their saved ones are not read."""
    token = _make_table.set(make_table)
    try:
        yield
    finally:
        _make_table.reset(token)


def strata_class(host: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The memory-carrying subclass of a host class, made once and known to the Auto classes.

    The first host class of a configuration is the one that the Auto classes open; a class derived
    from it shares its configuration, as everywhere in transformers.
    """
    if issubclass(host, MemoryModelMixin):
        return host
    if host not in _strata_classes:
        host_config = host.config_class
        assert host_config is not None
        first = host_config not in _strata_configs
        config_class: Any = _strata_config(host_config)
        model_class: Any = type(
            f"Strata{host.__name__}",
            (MemoryModelMixin, host),
            {
                "config_class": config_class,
                "__module__": __name__,
                "__doc__": f"{host.__name__} with memory layers or experts.",
            },
        )
        globals()[model_class.__name__] = model_class  # found by name, as every class is
        if first:
            AutoConfig.register(config_class.model_type, config_class)
            AutoModelForCausalLM.register(config_class, model_class)
        _strata_classes[host] = model_class
    return _strata_classes[host]


def _strata_config(host_config: type[PreTrainedConfig]) -> type[PreTrainedConfig]:
    if host_config not in _strata_configs:
        config_class: Any = type(
            f"Strata{host_config.__name__}",
            (MemoryConfigMixin, host_config),
            {
                "model_type": f"strata_{host_config.model_type}",
                "memory_layers": None,
                "expert_layers": None,
                "__annotations__": {
                    "memory_layers": dict[str, Any] | None,
                    "expert_layers": dict[str, Any] | None,
                },
                "__module__": __name__,
                "__doc__": f"{host_config.__name__} with `memory_layers` or `expert_layers`.",
            },
        )
        globals()[config_class.__name__] = config_class
        _strata_configs[host_config] = config_class
    return _strata_configs[host_config]


def register_hosts() -> None:
    """Make the Auto classes open strata folders of every supported host."""
    for module, name in HOSTS.items():
        package = importlib.import_module(f"transformers.models.{module}.modeling_{module}")
        strata_class(getattr(package, name))


def install(
    model: PreTrainedModel, config: MemoryLayerConfig, *, group: Group | None = None
) -> PreTrainedModel:
    """Put memory layers into any decoder, from scratch or trained, in place.

    The model keeps its identity and its weights; its class becomes the strata subclass of its
    host, so that `save_pretrained` writes a folder which the Auto classes open. A host outside
    the supported list works too; the program that opens its folder calls `strata_class(Host)`
    first.

    Args:
        model: a transformers decoder for causal language modelling.
        config: which layers, and what kind of memory.
        group: processes that hold the value tables together, by columns; None for whole ones.

    Returns:
        The same object.

    Raises:
        ConfigError: a layer is out of range or widths do not fit; the model is left as it was.
        ModelError: not a decoder with `layers[i].mlp` and a language-model head, or it has memory
            already.
    """
    if not model.can_generate() or model.config.get_text_config() is not model.config:
        raise ModelError(
            f"{type(model).__name__} is no text decoder with a language-model head: give a "
            "...ForCausalLM model"
        )
    if config.value_storage != "float":
        raise ConfigError(
            f"memory.value_storage {config.value_storage} belongs to a saved model: install float "
            "tables, train them, then quantize"
        )
    insert_memory(model, config, group=group)
    _become_strata(model).memory_layers = config.model_dump(mode="json")
    return model


def install_experts(
    model: PreTrainedModel, config: ExpertsConfig, *, alike: bool = False
) -> PreTrainedModel:
    """Put mixtures of experts into a decoder, in place, as `install` does memory; before it.

    Args:
        model: a transformers decoder for causal language modelling.
        config: which layers, and how many experts.
        alike: see `strata.layers.insert_experts`.

    Returns:
        The same object.

    Raises:
        ConfigError: a layer is out of range.
        ModelError: not a decoder with `layers[i].mlp`, or it has experts or memory already.
    """
    if value_tables(model):
        raise ModelError("this model has memory layers already: install experts before them")
    insert_experts(model, config, alike=alike)
    _become_strata(model).expert_layers = config.model_dump(mode="json")
    return model


def _become_strata(model: PreTrainedModel) -> Any:
    """Make a model one of its strata subclass; its configuration, now its own."""
    subclass = strata_class(type(model))
    _own_config(model)
    model.__class__ = subclass
    model.config.__class__ = subclass.config_class  # type: ignore[assignment]
    return model.config


def _own_config(model: PreTrainedModel) -> None:
    """Give the model a configuration of its own: another model may be built from the same one."""
    shared = model.config
    own = copy.deepcopy(shared)
    for module in model.modules():
        if module.__dict__.get("config") is shared:
            module.config = own  # type: ignore[assignment]
