"""Building a decoder from a recipe, and opening one from a folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, model_validator
from safetensors import SafetensorError, safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from strata.config import FrozenConfig, validate
from strata.errors import ConfigError, ModelError
from strata.layers import ExpertsConfig, MemoryLayerConfig
from strata.layers.collectives import Group
from strata.models.registration import install, install_experts
from strata.models.storage import VALUES, Values, open_with

DType = Literal["float32", "bfloat16"]


class ModelConfig(FrozenConfig):
    """The host decoder: fields of a transformers configuration, or a trained model's path."""

    host: dict[str, Any] | None = Field(
        default=None, description="model_type and the fields of its configuration, from scratch"
    )
    path: str | None = Field(default=None, description="a trained model: local folder or hub id")
    dtype: DType = Field(default="float32", description="of the weights")
    attn_implementation: str | None = Field(
        default=None, description="None: what transformers prefers for the host"
    )
    gradient_checkpointing: bool = False
    experts: ExpertsConfig | None = Field(
        default=None, description="mixtures of experts in the place of feed-forward layers"
    )

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if (self.host is None) == (self.path is None):
            raise ValueError("give exactly one of host (from scratch) and path (a trained model)")
        if self.host is not None and "model_type" not in self.host:
            raise ValueError("host needs model_type, for example llama")
        return self


def build(
    config: ModelConfig,
    memory: MemoryLayerConfig | None,
    *,
    device: torch.device | str = "cpu",
    group: Group | None = None,
) -> PreTrainedModel:
    """Build a decoder, with experts and memory layers if asked for.

    Args:
        config: the host.
        memory: memory layers to install; None for the plain decoder.
        device: "meta" gives shapes without storage (a trained model's weights are then not read).
        group: processes that hold new value tables together, by columns; None for whole ones.

    Raises:
        ConfigError: a field of the host is unknown or not allowed.
        ModelError: the path cannot be opened.
    """
    host = _host_config(config)
    dtype = getattr(torch, config.dtype)
    attention = _attention(config.attn_implementation)
    if config.path is not None and torch.device(device).type != "meta":
        model = _open(config.path, dtype=dtype, **attention)
        model.to(device)  # type: ignore[arg-type]
    else:
        try:
            with torch.device(device):
                model = AutoModelForCausalLM.from_config(host, dtype=dtype, **attention)
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise ConfigError(f"model.host cannot be built: {_one_line(error)}") from None
    if config.experts is not None:
        install_experts(model, config.experts, alike=config.path is not None)
    if memory is not None:
        install(model, memory, group=group)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def load(
    folder: str | Path, *, values: Values | None = None, cache_gb: float = 1.0
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Open a saved model and the tokenizer beside it, in the dtype it was saved in.

    Args:
        folder: written by save_pretrained.
        values: how to hold the value tables: as saved (None), quantized while they are read
            ("int8", "fp8"), or left on disk and read row by row ("mapped").
        cache_gb: memory for the hot rows of mapped tables, all together, GiB.

    Raises:
        ModelError: not a model folder, or damaged; one line says what to do.
        ConfigError: `values` or `cache_gb` is not allowed, or does not fit this model.
    """
    if values is not None and values not in VALUES:
        raise ConfigError(f"no value storage {values!r}: give one of {', '.join(VALUES)}")
    if not 0 < cache_gb < float("inf"):
        raise ConfigError(f"a cache of {cache_gb} GB is not allowed: give more than 0")
    folder = Path(folder)
    if not folder.is_dir():
        raise ModelError(f"no model folder at {folder}: give a folder written by save_pretrained")
    if not (folder / "config.json").is_file():
        raise ModelError(f"{folder} holds no config.json: give a folder written by save_pretrained")
    if values is None:
        model = _open(str(folder), dtype="auto")
    else:
        memory = saved_memory(folder)
        model = open_with(
            lambda: _open(str(folder), dtype="auto"),
            folder,
            memory,
            values=values,
            cache_gb=cache_gb,
        )
    model.eval()
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # tokenizers raises bare Exception on a damaged file
        raise ModelError(f"no tokenizer can be opened in {folder}: {_one_line(error)}") from None
    return model, tokenizer


def saved_memory(folder: Path) -> MemoryLayerConfig:
    """The memory layers in the configuration of a saved model.

    Raises:
        ModelError: the configuration cannot be read, or the model has no memory layers.
    """
    _check_weights(folder)
    tree = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    fields = tree.get("memory_layers") if isinstance(tree, dict) else None
    if not isinstance(fields, dict):
        raise ModelError(f"{folder} has no memory layers, so no value tables to choose for")
    return validate(MemoryLayerConfig, fields, origin=f"{folder / 'config.json'}: memory_layers")


def _open(path: str, *, dtype: Any, **attention: str) -> PreTrainedModel:
    if Path(path).is_dir():
        _check_weights(Path(path))
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, output_loading_info=True, **attention
        )
    except ModelError:
        raise
    except Exception as error:  # transformers and safetensors raise many kinds for a bad folder
        raise ModelError(f"cannot open the model at {path}: {_one_line(error)}") from None
    model, info = opened
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would draw them at random
        raise ModelError(
            f"{path} lacks {len(missing)} weights, first {missing[0]}: copy or save it again"
        )
    return model


def _check_weights(folder: Path) -> None:
    """Refuse damaged JSON and safetensors with the file's name; transformers would not say it."""
    for path in sorted(folder.glob("*.json")):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ModelError(
                f"{path} is not JSON ({_one_line(error)}): copy or save the folder again"
            ) from None
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} is damaged ({_one_line(error)}): copy or save the folder again"
            ) from None


def _host_config(config: ModelConfig) -> PreTrainedConfig:
    if config.path is not None:
        try:
            return AutoConfig.from_pretrained(config.path)
        except Exception as error:  # see _open
            raise ModelError(
                f"cannot open the model at {config.path}: {_one_line(error)}"
            ) from None
    assert config.host is not None
    fields = dict(config.host)
    model_type = fields.pop("model_type")
    try:
        host = AutoConfig.for_model(model_type, **fields)
    except Exception as error:  # strict dataclasses raise their own kinds
        raise ConfigError(f"model.host: {_one_line(error)}") from None
    known = set(type(host)().to_dict()) | {"rope_theta", "rope_scaling"}
    unknown = sorted(set(fields) - known)
    if unknown:
        raise ConfigError(f"model.host.{unknown[0]} is not a field of {type(host).__name__}")
    return host


def _attention(name: str | None) -> dict[str, str]:
    return {} if name is None else {"attn_implementation": name}


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
