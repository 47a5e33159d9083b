"""Building from a recipe and from a folder, on the CPU and on the meta device."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from strata.errors import ModelError
from strata.layers import MemoryLayerConfig, memory_layers
from strata.models import ModelConfig, build, count

MEMORY = MemoryLayerConfig(layers=(1,), num_half_keys=8, top_k=4, num_heads=2)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_dtype(tiny_model_config: Callable[..., ModelConfig], dtype: str) -> None:
    config = tiny_model_config().model_copy(update={"dtype": dtype})
    model = build(config, MEMORY)
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert all(p.isfinite().all() for p in model.parameters())


def test_the_seed_decides_the_weights(tiny_model_config: Callable[..., ModelConfig]) -> None:
    models = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        models.append(build(tiny_model_config(), MEMORY).state_dict())
    assert all(torch.equal(tensor, models[1][name]) for name, tensor in models[0].items())
    for name in ("model.memory_values.0.weight", "model.layers.1.mlp.keys.half_keys"):
        assert not torch.equal(models[0][name], models[2][name])


def test_attention_implementation(tiny_model_config: Callable[..., ModelConfig]) -> None:
    for name in ("eager", "sdpa"):
        config = tiny_model_config().model_copy(update={"attn_implementation": name})
        assert build(config, MEMORY).config._attn_implementation == name


class TestFromAFolder:
    @pytest.fixture
    def plain(self, build_tiny: Callable[..., PreTrainedModel], tmp_path: Path) -> Path:
        build_tiny(memory=None).save_pretrained(tmp_path / "plain")
        return tmp_path / "plain"

    def test_weights_are_read_and_memory_is_added(self, plain: Path) -> None:
        bare = build(ModelConfig(path=str(plain)), None)
        model = build(ModelConfig(path=str(plain)), MEMORY)
        assert [name for name, _ in memory_layers(model)] == ["model.layers.1.mlp"]
        kept = model.state_dict()
        for name, tensor in bare.state_dict().items():
            if not name.startswith("model.layers.1.mlp"):
                assert torch.equal(kept[name], tensor), name

    def test_on_the_meta_device_nothing_is_read(self, plain: Path) -> None:
        for file in plain.glob("*.safetensors"):
            file.write_bytes(b"")
        model = build(ModelConfig(path=str(plain)), MEMORY, device="meta")
        assert {p.device.type for p in model.parameters()} == {"meta"}
        assert count(model, sequence_tokens=8).params_values == MEMORY.num_rows * 32

    def test_a_folder_with_memory(
        self, build_tiny: Callable[..., PreTrainedModel], tmp_path: Path
    ) -> None:
        """Opened with what it has; asked for more, it is refused."""
        build_tiny().save_pretrained(tmp_path / "with")
        config = ModelConfig(path=str(tmp_path / "with"))
        for device in ("cpu", "meta"):
            assert len(list(memory_layers(build(config, None, device=device)))) == 2
            with pytest.raises(ModelError, match="already"):
                build(config, MEMORY, device=device)

    def test_a_damaged_folder(self, plain: Path) -> None:
        path = plain / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-7])
        with pytest.raises(ModelError, match=r"model\.safetensors") as caught:
            build(ModelConfig(path=str(plain)), MEMORY)
        assert "\n" not in str(caught.value)

    def test_a_plain_folder_that_lacks_a_weight(self, plain: Path) -> None:
        """transformers would fill it at random and warn; a model that is not whole is refused."""
        from safetensors.torch import load_file, save_file

        weights = load_file(plain / "model.safetensors")
        del weights["model.layers.0.mlp.up_proj.weight"]
        save_file(weights, plain / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ModelError, match="up_proj") as caught:
            build(ModelConfig(path=str(plain)), None)
        assert "\n" not in str(caught.value)
