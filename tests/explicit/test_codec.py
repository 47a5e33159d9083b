"""Memories to blobs and back: sizes, exactness, FAISS' own decoder, training."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from strata.errors import BankError
from strata.explicit.codec import (
    FaissCodec,
    codec_state,
    faiss_factory,
    make_codec,
    read_codec,
)
from strata.explicit.memories import Memories, MemoryShape

SHAPE = MemoryShape(heads=((0, 0), (0, 1), (2, 0)), tokens=4, head_dim=16)


def make_memories(shape: MemoryShape, count: int, *, seed: int = 0) -> Memories:
    """Random memories, some with empty places."""
    rng = torch.Generator().manual_seed(seed)
    s, t, d = len(shape.heads), shape.tokens, shape.head_dim
    kept_n = torch.randint(1, t + 1, (count,), generator=rng)
    filled = torch.arange(t) < kept_n[:, None, None]
    places = torch.randint(0, 127, (count, s, t), generator=rng).sort(-1).values
    keys, values = (
        torch.randn(count, s, t, d, generator=rng) * filled[..., None] for _ in range(2)
    )
    return Memories(keys, values, (places * filled).to(torch.int16), kept_n)


def assert_same_places(got: Memories, want: Memories) -> None:
    assert torch.equal(got.places_nst, want.places_nst) and torch.equal(got.kept_n, want.kept_n)
    assert got.places_nst.dtype == torch.int16 and got.kept_n.dtype == torch.int64


@pytest.mark.parametrize("name", ["fp32", "bf16"])
def test_floats_come_back_bit_for_bit(name: str) -> None:
    memories = make_memories(SHAPE, 5)
    if name == "bf16":
        memories = memories.to(torch.bfloat16)
    codec = make_codec(name, SHAPE)
    blobs = codec.encode(memories)
    assert {len(blob) for blob in blobs} == {codec.bytes_per_memory}
    back = codec.decode(blobs)
    assert torch.equal(back.keys_nstd, memories.keys_nstd.float())
    assert torch.equal(back.values_nstd, memories.values_nstd.float())
    assert_same_places(back, memories)
    assert codec.decode(blobs, dtype=torch.bfloat16).keys_nstd.dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "steps"), [("int8", 127), ("int4", 7)])
@pytest.mark.parametrize("head_dim", [16, 7])
def test_integers_are_within_half_a_step(name: str, steps: int, head_dim: int) -> None:
    shape = MemoryShape(SHAPE.heads, SHAPE.tokens, head_dim)
    memories = make_memories(shape, 6)
    codec = make_codec(name, shape)
    back = codec.decode(codec.encode(memories))
    for got, want in (
        (back.keys_nstd, memories.keys_nstd),
        (back.values_nstd, memories.values_nstd),
    ):
        # The step is rounded to fp16: by 2^-11 of itself, over at most `steps` steps.
        step = want.abs().amax(-1, keepdim=True) / steps
        assert ((got - want).abs() <= step * (0.5 + (steps + 1) * 2**-11) + 1e-7).all()
        assert (got - want).abs().max() > 0
    assert_same_places(back, memories)


def test_sizes_are_those_of_the_paper() -> None:
    """(22 layers, 8 heads, 8 tokens, 80): 440 KiB in bf16 and 38.5 KiB in codes, places apart."""
    paper = MemoryShape(tuple((a, b) for a in range(22) for b in range(8)), 8, 80)
    places = 22 * 8 * 8 * 2 + 2
    assert make_codec("bf16", paper).bytes_per_memory == 440 * 1024 + places
    assert make_codec("faiss", paper).bytes_per_memory == 38.5 * 1024 + places
    assert make_codec("int8", paper).bytes_per_memory == paper.vectors * 82 + places
    assert make_codec("int4", paper).bytes_per_memory == paper.vectors * 42 + places


@pytest.mark.parametrize(
    ("head_dim", "factory"),
    [
        (8, "OPQ2_8,Residual2x14,PQ8x10"),
        (16, "OPQ4_16,Residual2x14,PQ8x10"),
        (32, "OPQ8_32,Residual2x14,PQ8x10"),
        (64, "OPQ16_64,Residual2x14,PQ8x10"),
        (80, "OPQ20_80,Residual2x14,PQ8x10"),
        (96, "OPQ24_96,Residual2x14,PQ8x10"),
        (128, "OPQ32_128,Residual2x14,PQ8x10"),
        (256, "OPQ64_256,Residual2x14,PQ8x10"),
        (100, "OPQ25_100,Residual2x14,PQ10x10"),
        (14, "OPQ2_14,Residual2x14,PQ7x10"),
    ],
)
def test_the_papers_quantizer_for_other_widths(head_dim: int, factory: str) -> None:
    assert faiss_factory(head_dim) == factory
    shape = MemoryShape(((0, 0),), 1, head_dim)
    codec = make_codec("faiss", shape)
    assert isinstance(codec, FaissCodec) and codec.factory == factory


TRAINED = ["OPQ4_16,Residual2x6,PQ4x5", "Residual2x5,PQ2x4", "SQ8", "PQ4x6", "PCA8,SQ8"]


@pytest.mark.parametrize("name", TRAINED)
def test_codes_are_those_of_faiss_and_decode_as_it_decodes_them(name: str) -> None:
    """Real vectors and random codes; own loops where the form is ours, FAISS elsewhere."""
    memories = make_memories(SHAPE, 60)
    codec = make_codec(name, SHAPE)
    assert isinstance(codec, FaissCodec) and not codec.trained
    codec.train(memories, iterations=4)
    assert codec.own_decoder == ("Residual" in name)
    fresh = make_memories(SHAPE, 7, seed=1)
    blobs = codec.encode(fresh)
    assert blobs == codec.encode(fresh)
    back = codec.decode(blobs)
    assert_same_places(back, fresh)
    empty = torch.arange(SHAPE.tokens) >= fresh.kept_n[:, None, None]
    assert (back.keys_nstd[empty.expand(7, 3, 4)] == 0).all()

    raw = np.frombuffer(b"".join(blobs), np.uint8).reshape(7, -1)
    codes = raw[:, : SHAPE.vectors * codec.vector_bytes].reshape(7, 3, 2, 4, -1)
    for at, got in enumerate((back.keys_nstd, back.values_nstd)):
        index = codec._indexes[("keys", "values")[at]]
        flat = np.ascontiguousarray(codes[:, :, at].reshape(-1, codec.vector_bytes))
        if name == TRAINED[0]:  # any index it can write: 6 bits are left over in the coarse code
            rng = np.random.default_rng(0)
            loose = rng.integers(0, 256, (500, codec.vector_bytes), dtype=np.uint8)
            loose[:, 1] &= 15
            own = codec._decode_vectors(torch.from_numpy(loose), ("keys", "values")[at])
            np.testing.assert_allclose(own.numpy(), index.sa_decode(loose), atol=1e-5)
        kind = ("keys", "values")[at]
        given = codec._to_code((fresh.keys_nstd, fresh.values_nstd)[at], kind)
        given = given[~empty.expand(7, 3, 4)]
        same = torch.from_numpy(codes[:, :, at].copy())[~empty.expand(7, 3, 4)]
        # Of two entries that are equally near, up to rounding, either may be taken.
        assert (same.numpy() == index.sa_encode(given.numpy())).all(1).mean() > 0.99
        want = torch.from_numpy(index.sa_decode(flat)).reshape(got.shape)
        want = codec._from_code(want, kind).masked_fill(empty[..., None], 0)
        torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)


def test_keys_and_values_have_codebooks_of_their_own() -> None:
    memories = make_memories(SHAPE, 60)
    memories = Memories(
        memories.keys_nstd, memories.values_nstd * 100, memories.places_nst, memories.kept_n
    )
    codec = make_codec("Residual2x5,PQ2x4", SHAPE)
    codec.train(memories, iterations=4)
    back = codec.decode(codec.encode(memories))
    for got, want in (
        (back.keys_nstd, memories.keys_nstd),
        (back.values_nstd, memories.values_nstd),
    ):
        assert (got - want).norm() < 0.8 * want.norm()


@pytest.mark.parametrize("name", ["OPQ4_16,Residual2x6,PQ4x5", "PQ4x6"])
def test_heads_far_apart_are_coded_as_well_as_heads_alike(name: str) -> None:
    """One quantizer for all heads would spend its entries on the widest of them."""
    alike, fresh = make_memories(SHAPE, 60), make_memories(SHAPE, 20, seed=1)
    scale_s11 = torch.tensor([1.0, 0.01, 30.0])[:, None, None]
    shift_s1d = torch.randn(3, 1, SHAPE.head_dim, generator=torch.Generator().manual_seed(2))

    def apart(memories: Memories) -> Memories:
        keys_nstd = (memories.keys_nstd + 5 * shift_s1d) * scale_s11
        return Memories(keys_nstd, memories.values_nstd, memories.places_nst, memories.kept_n)

    filled_nt = torch.arange(SHAPE.tokens) < fresh.kept_n[:, None]
    errors = []
    for change in (lambda memories: memories, apart):
        codec = make_codec(name, SHAPE)
        codec.train(change(alike), iterations=4)
        got, want = codec.decode(codec.encode(change(fresh))), change(fresh)
        lost = (got.keys_nstd - want.keys_nstd).transpose(1, 2)[filled_nt]
        spread = want.keys_nstd.transpose(1, 2)[filled_nt]
        errors.append(lost.square().mean((0, 2)) / spread.var(0).mean(1))
    torch.testing.assert_close(errors[1], errors[0], rtol=0.05, atol=0.0)


def test_what_never_changes_is_kept_as_it_is() -> None:
    memories = make_memories(SHAPE, 60)
    memories.keys_nstd[:, 1] = 3.0
    codec = make_codec("PQ4x6", SHAPE)
    codec.train(memories, iterations=4)
    back = codec.decode(codec.encode(memories[:5]))
    filled_nt = torch.arange(SHAPE.tokens) < memories.kept_n[:5, None]
    assert (back.keys_nstd[:, 1][filled_nt] - 3.0).abs().max() < 1e-5


@pytest.mark.slow
def test_the_papers_quantizer_at_its_width() -> None:
    """16,384 centroids a half; error and size of the real thing, state through bytes."""
    shape = MemoryShape(tuple((a, 0) for a in range(22)), 8, 80)
    rng = torch.Generator().manual_seed(0)
    mix = torch.randn(80, 80, generator=rng) * torch.linspace(2, 0.02, 80)
    sample = make_memories(shape, 200)
    sample = Memories(
        sample.keys_nstd @ mix, sample.values_nstd @ mix, sample.places_nst, sample.kept_n
    )
    codec = make_codec("faiss", shape)
    codec.train(sample, iterations=2)
    assert codec.own_decoder
    again = read_codec("faiss", shape, *codec_state(codec), origin="codec")
    blobs = codec.encode(sample[:8])
    assert again.own_decoder and again.encode(sample[:8]) == blobs
    back = again.decode(blobs)
    assert (back.keys_nstd - sample.keys_nstd[:8]).norm() < 0.5 * sample.keys_nstd[:8].norm()


def test_the_state_goes_through_bytes() -> None:
    codec = make_codec(TRAINED[0], SHAPE)
    codec.train(make_memories(SHAPE, 60), iterations=3)
    state = codec_state(codec)
    again = read_codec(TRAINED[0], SHAPE, *state, origin="codec.safetensors")
    memories = make_memories(SHAPE, 3, seed=4)
    blobs = codec.encode(memories)
    assert again.encode(memories) == blobs
    # FAISS reads its own matrices back as another class; the fast decoder must know them still.
    assert isinstance(again, FaissCodec) and again.own_decoder
    assert torch.equal(again.decode(blobs).keys_nstd, codec.decode(blobs).keys_nstd)
    bare = {kind: codec.state_dict()[kind] for kind in ("keys", "values")}
    with pytest.raises(BankError, match=r"wants .*keys_mean.* make the bank again"):
        again.load_state_dict(bare)
    other = MemoryShape(SHAPE.heads, SHAPE.tokens, 32)
    with pytest.raises(BankError, match="width 16, not for"):
        read_codec("OPQ4_32,Residual2x6,PQ4x5", other, *state, origin="codec.safetensors")


def test_training_twice_gives_the_same_codec() -> None:
    codecs = [make_codec(TRAINED[0], SHAPE) for _ in range(2)]
    for codec in codecs:
        codec.train(make_memories(SHAPE, 60), iterations=3)
    memories = make_memories(SHAPE, 9, seed=2)
    assert codecs[0].encode(memories) == codecs[1].encode(memories)


def test_a_sample_too_small_says_how_many_are_needed() -> None:
    codec = make_codec("faiss", SHAPE)
    sample = make_memories(SHAPE, 10)
    have = int(sample.kept_n.sum()) * 3
    with pytest.raises(
        BankError,
        match=rf"needs at least 16,384 keys .* the 10 memories given hold {have}: add more doc",
    ):
        codec.train(sample)
    with pytest.raises(BankError, match="not trained yet"):
        codec.encode(sample)


@pytest.mark.parametrize(
    "name", ["int7", "", "faiss; rm", "PQ99999999x8", "HNSW16", "x" * 200, "PQ5x8", "OPQ3_16,PQ3x8"]
)
def test_unknown_codecs_are_refused(name: str) -> None:
    with pytest.raises(BankError, match=r"no codec .* use fp32, bf16, int8, int4, faiss") as error:
        make_codec(name, SHAPE)
    assert "\n" not in str(error.value)


def test_odd_widths_have_no_paper_quantizer() -> None:
    with pytest.raises(BankError, match="even head width, this model's is 7: use int8"):
        make_codec("faiss", MemoryShape(((0, 0),), 2, 7))


def test_numbers_that_cannot_be_stored_are_refused() -> None:
    memories = make_memories(SHAPE, 3)
    memories.values_nstd[1, 0, 0, 0] = float("nan")
    for name in ("fp32", "int8"):
        with pytest.raises(BankError, match="values of memory 1 hold NaN"):
            make_codec(name, SHAPE).encode(memories)
    memories.values_nstd[1, 0, 0, 0] = 1e9
    with pytest.raises(BankError, match="values as large as 1e\\+09 do not fit int8: use bf16"):
        make_codec("int8", SHAPE).encode(memories)
    other = MemoryShape(SHAPE.heads, 5, 16)
    with pytest.raises(BankError, match="do not fit a bank of"):
        make_codec("bf16", other).encode(memories)


def test_blobs_that_cannot_be_are_refused() -> None:
    codec = make_codec("int8", SHAPE)
    (blob,) = codec.encode(make_memories(SHAPE, 1))
    with pytest.raises(BankError, match="a memory of 3 bytes"):
        codec.decode([b"abc"])
    with pytest.raises(BankError, match="more than 4 tokens"):
        codec.decode([blob[:-2] + b"\x05\x00"])
    assert len(codec.decode([])) == 0
