"""The codec against the format's definition, ml_dtypes' own e2m1 and a brute-force packer."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import treescope
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gptoss_jax import mxfp4
from gptoss_jax.errors import GptOssError
from gptoss_jax.mxfp4 import MxTensor


def random_bytes(shape, seed=0, low=3, high=250):
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (*shape, 16), np.uint8)
    return blocks, generator.integers(low, high, shape, np.uint8)


def test_every_code_and_scale_against_ml_dtypes():
    """All 256 bytes under all 255 scales, by another library's e2m1 and float64 powers."""
    blocks = np.arange(256, dtype=np.uint8).reshape(16, 16)
    nibbles = np.stack([blocks & 15, blocks >> 4], -1).reshape(16, 32)
    values = nibbles.astype(np.uint8).view(ml_dtypes.float4_e2m1fn).astype(np.float64)
    for scale in range(255):
        found = mxfp4.unpack(blocks[:, None], np.full((16, 1), scale, np.uint8))
        with np.errstate(over="ignore"):
            expected = (values * 2.0 ** (scale - 127)).astype(np.float32)
        np.testing.assert_array_equal(found, expected, err_msg=f"scale {scale}")


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_device_decode_is_exact_where_nothing_is_subnormal(dtype):
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(16, 16), (250, 1, 1))
    scales = np.repeat(np.arange(2, 252, dtype=np.uint8)[:, None], 16, axis=1)
    found = jax.jit(mxfp4.decode, static_argnames="dtype")(blocks, scales, dtype=dtype)
    np.testing.assert_array_equal(np.asarray(found, np.float32), mxfp4.unpack(blocks, scales))


def test_half_units_never_become_subnormal():
    """0.5 at the smallest scales: a decode through bfloat16 subnormals gives 0 here, because the
    CPU flushes them.
    """
    blocks = np.full((3, 16), 0x11, np.uint8)
    found = jax.jit(mxfp4.decode)(blocks, np.array([2, 3, 4], np.uint8))
    np.testing.assert_array_equal(
        np.asarray(found, np.float64).reshape(3, 32)[:, 0], [2.0**-126, 2.0**-125, 2.0**-124]
    )


def brute_force(block):
    """Least squared error over every scale and, for it, the nearest code of every value."""
    best = np.inf
    for scale in range(-127, 128):
        grid = mxfp4.E2M1[:8].astype(np.float64) * 2.0**scale
        error = (np.abs(np.abs(block)[:, None] - grid[None]).min(1) ** 2).sum()
        best = min(best, error)
    return best


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(np.float32, (1, 32), elements=st.floats(-1e6, 1e6, width=32, allow_subnormal=False))
)
def test_pack_finds_the_best_scale(values):
    packed = mxfp4.pack(values)
    error = ((mxfp4.unpack(packed.blocks, packed.scales) - values.astype(np.float64)) ** 2).sum()
    best = brute_force(values[0].astype(np.float64))
    assert error <= best * (1 + 1e-6) + 1e-30


def same_bytes(values):
    packed, encoded = mxfp4.pack(np.asarray(values, np.float32)), mxfp4.encode(jnp.asarray(values))
    np.testing.assert_array_equal(np.asarray(encoded.scales), packed.scales)
    np.testing.assert_array_equal(np.asarray(encoded.blocks), packed.blocks)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float32])
def test_the_device_packs_the_same_bytes(dtype):
    """Blocks of every size that the device's numbers reach, of normal and of heavy-tailed values,
    of few values and none.
    """
    generator = np.random.default_rng(0)
    values = generator.standard_normal((4000, 96)) * generator.choice([0.01, 1], (4000, 96))
    values[::3] **= 3
    values[::7] *= generator.random((len(values[::7]), 96)) < 0.05
    values = values.reshape(4000, 3, 32)
    values /= np.maximum(np.abs(values).max(-1, keepdims=True), 1e-30)
    values *= 2.0 ** generator.uniform(-120, 127, (4000, 3, 1))
    same_bytes(values.reshape(4000, 96).astype(dtype))


@settings(max_examples=60, deadline=None)
@given(hnp.arrays(np.float32, (1, 32), elements=st.floats(-6e4, 6e4, width=16)))
def test_the_device_packs_the_same_bytes_of_halves(values):
    same_bytes(values)


def test_pack_gives_mxfp4_values_back():
    blocks, scales = random_bytes((7, 5))
    values = mxfp4.unpack(blocks, scales)
    packed = mxfp4.pack(values)
    np.testing.assert_array_equal(mxfp4.unpack(packed.blocks, packed.scales), values)


def test_pack_keeps_zeros_and_signs():
    packed = mxfp4.pack(np.array([[0.0] * 31 + [-0.0]], np.float32))
    assert packed.scales.tolist() == [[127]]
    assert packed.blocks[0, 0, 15] == 0x80


def test_refusals():
    blocks, scales = random_bytes((2, 3))
    scales[1, 2] = 255
    with pytest.raises(
        GptOssError, match=r"^up: scale 255 \(NaN in MXFP4\) at \(1, 2\): the checkpoint is damaged"
    ):
        mxfp4.check_scales(scales, "up")
    with pytest.raises(GptOssError, match="scale 255"):
        mxfp4.unpack(blocks, scales)
    with pytest.raises(GptOssError, match="last axis of \\(4, 33\\) is no multiple of 32"):
        mxfp4.pack(np.zeros((4, 33)))
    with pytest.raises(GptOssError, match="NaN or infinity"):
        mxfp4.pack(np.full((1, 32), np.nan))


def test_tensor_is_a_pytree_that_indexes_multiplies_and_prints():
    blocks, scales = random_bytes((6, 10, 3), low=120, high=134)
    tensor = MxTensor(jnp.asarray(blocks), jnp.asarray(scales))
    values = mxfp4.unpack(blocks, scales)
    assert tensor.shape == (6, 10, 96)
    assert (tensor.ndim, tensor.size, tensor.nbytes) == (3, 5760, 17 * 180)
    doubled = jax.jit(lambda t: jax.tree.map(lambda x: x, t))(tensor)
    assert isinstance(doubled, MxTensor)
    np.testing.assert_array_equal(tensor[4].dequantize(jnp.float32), values[4])
    np.testing.assert_array_equal(
        tensor[jnp.array([1, 3]), 2].dequantize(jnp.float32), values[[1, 3], 2]
    )
    with pytest.raises(GptOssError, match="indexed along its first 2 axes"):
        tensor[0, 0, 0]
    x = np.random.default_rng(1).normal(size=(96, 2)).astype(np.float32)
    np.testing.assert_allclose(tensor[0] @ jnp.asarray(x), values[0] @ x, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(
        jnp.asarray(x[:10].T) @ tensor[0], x[:10].T @ values[0], rtol=1e-4, atol=1e-4
    )
    assert "MxTensor" in treescope.render_to_text(tensor)
    assert "shape=(6, 10, 96)" in repr(tensor)


def test_tensor_is_sharded_by_expert():
    mesh = jax.make_mesh((4,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,))
    blocks, scales = random_bytes((8, 10, 3))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("expert"))
    tensor = jax.device_put(MxTensor(jnp.asarray(blocks), jnp.asarray(scales)), sharding)
    assert tensor.blocks.addressable_shards[1].data.shape == (2, 10, 3, 16)
    np.testing.assert_array_equal(
        tensor[5].dequantize(jnp.float32), mxfp4.unpack(blocks[5], scales[5])
    )
