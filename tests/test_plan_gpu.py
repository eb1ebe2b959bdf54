"""The whole decode step compiled for GPUs that are not there: kernels a layer, temporaries, and what
they are.
"""

import dataclasses
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptoss_jax import bounds, ops, sharding
from gptoss_jax.config import GptOssConfig
from gptoss_jax.ops import backends
from gptoss_jax.plan import hardware, hlo, programs, ptx

cuda = pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda13_plugin"),
    reason="needs jax's CUDA plugin: pip install -e '.[cuda]'",
)
# Of a layer with a ring and of one with a full cache; why each is a kernel of its own:
KERNELS = {
    "layer/qkv/products": (1, 1),  # norm, q, k, v and biases
    "layer/attend_one/attention_step": (1, 1),  # rotation, both stores, attention
    "layer/attend_one/attention_combine": (0, 1),  # programs of a long cache wait for each other
    "layer/o/products": (1, 1),  # needs all heads; bias, residual
    "layer/norm_route/products": (1, 1),  # needs the whole row; router's logits
    "layer/norm_route/choose": (1, 1),  # needs all logits
    "layer/expert_mlp/experts_gate_up": (1, 1),  # needs the choice
    "layer/expert_mlp/experts_down": (1, 1),  # needs all hidden activations
}
# XLA makes one more of each layer, the chosen experts' outputs and the residual added; and a dozen of
# positions and blocks that all layers of a kind share, filed under the first that needs them. Where
# arguments fill 80 % of a device (120b, batch 8, A100) it makes what is shared again in each layer.
OUTSIDE = 32  # embedding, last norm, unembedding, sampling, the loop's own


def test_kernels_of_a_loop_are_read_from_its_text():
    text = """HloModule jit_f, is_scheduled=true

%fused.1 (p: bf16[8]) -> bf16[8] {
  %p = bf16[8]{0} parameter(0)
  ROOT %add.1 = bf16[8]{0} add(%p, %p), metadata={op_name="jit(f)/while/body/layer1/o/add"}
}

%body.1 (t: (bf16[8], s32[])) -> (bf16[8], s32[]) {
  %t = (bf16[8]{0}, s32[]) parameter(0)
  %x = bf16[8]{0} get-tuple-element(%t), index=0
  %pallas_call.1 = bf16[8]{0} custom-call(%x), custom_call_target="__gpu$xla.gpu.triton", metadata={op_name="jit(f)/while/body/layer0/qkv/products/pallas_call"}
  %bitcast.1 = bf16[8]{0} bitcast(%pallas_call.1)
  %gemm_fusion.1 = bf16[8]{0} fusion(%bitcast.1), kind=kCustom, calls=%fused.1
  %copy.1 = bf16[8]{0} copy(%gemm_fusion.1)
  %loop_fusion.2 = s32[] fusion(%i), kind=kLoop, calls=%other.1, metadata={op_name="jit(f)/while/body/sample/or"}
  %while.3 = (s32[]) while(%y), condition=%c.1, body=%b.1, metadata={op_name="jit(f)/while/body/layer1/expert_mlp/while"}
  ROOT %tuple.1 = (bf16[8]{0}, s32[]) tuple(%copy.1, %loop_fusion.2)
}

ENTRY %main (a: bf16[8]) -> bf16[8] {
  %while.1 = (bf16[8], s32[]) while(%t), condition=%cond.1, body=%body.1
}
"""
    found = hlo.kernels(text)
    assert [(one.name, one.layer) for one in found] == [
        ("pallas_call.1", 0), ("gemm_fusion.1", 1), ("copy.1", None), ("loop_fusion.2", None),
        ("while.3", 1),
    ]  # fmt: skip
    assert found[0].kind == "__gpu$xla.gpu.triton"
    assert hlo.scopes(found) == {
        "layer/qkv/products": 1, "layer/o: fusion": 1, "copy": 1, "sample: fusion": 1,
        "layer/expert_mlp: while": 1,
    }  # fmt: skip


def test_collectives_with_work_beside_them_are_found():
    text = """HloModule jit_f, is_scheduled=true

ENTRY %main (a: bf16[8]) -> bf16[8] {
  %a = bf16[8]{0} parameter(0)
  %f.1 = bf16[8]{0} fusion(%a), kind=kLoop, calls=%g
  %all-reduce-start.1 = bf16[8]{0} all-reduce-start(%f.1), to_apply=%sum
  %b.1 = bf16[8]{0} bitcast(%a)
  %all-reduce-done.1 = bf16[8]{0} all-reduce-done(%all-reduce-start.1)
  %all-reduce-start.2 = bf16[8]{0} all-reduce-start(%f.1), to_apply=%sum
  %f.2 = bf16[8]{0} fusion(%b.1), kind=kLoop, calls=%g
  %all-reduce-done.2 = bf16[8]{0} all-reduce-done(%all-reduce-start.2)
  ROOT %all-reduce.3 = bf16[8]{0} all-reduce(%all-reduce-done.2), to_apply=%sum
}
"""
    assert hlo.overlapped(text) == {"all-reduce": (3, 1)}


@pytest.mark.parametrize(
    ("card", "gigabytes", "bandwidth"),
    [
        ("a100-40", 40, 1555), ("a100", 80, 2039), ("h100", 80, 3350), ("h200", 141, 4800),
        ("l4", 24, 300), ("l40s", 48, 864), ("4090", 24, 1008), ("b200", 180, 8000),
    ],
)  # fmt: skip
def test_common_cards_are_known_and_can_be_compiled_for(card, gigabytes, bandwidth):
    """The sizes that they are sold by, in GB or GiB, of which a program gets 97 %."""
    device = hardware.parse(f"{card}:1").device
    assert 0.97 * gigabytes < device.memory / 1e9 < 1.075 * gigabytes
    assert device.bandwidth == bandwidth * 1e9
    assert device.capability in programs.KNOWN_CARDS


@pytest.mark.parametrize("sizes", [{"data": 2, "tensor": 4}, {"expert": 4, "tensor": 2}])
def test_rows_of_a_spread_table_are_the_tables(sizes):
    table = jnp.asarray(np.random.default_rng(0).normal(size=(24, 6)), jnp.bfloat16)
    tokens = jnp.asarray([[0, 23, 5], [6, 12, 11], [17, 18, 0], [1, 2, 3]], jnp.int32)
    with jax.set_mesh(sharding.make_mesh(sizes)), backends.use(embed="gpu"):
        got = jax.jit(ops.embed)(tokens, table)
    np.testing.assert_array_equal(
        np.asarray(got, np.float32), np.asarray(table[tokens], np.float32)
    )


@cuda
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("batch", [1, 8])
@pytest.mark.parametrize("topology", ["h200:1", "a100:1"])
@pytest.mark.parametrize("model", ["gpt-oss-20b", "gpt-oss-120b"])
def test_a_decode_step_starts_at_most_ten_kernels_a_layer(model, topology, batch):
    config, slice_ = GptOssConfig.preset(model), hardware.parse(topology)
    found = programs.Steps(config, {}, programs.devices(slice_)).decode(batch, 8192)
    started = found.started
    assert started is not None
    layers = config.num_layers
    inside = sum(count for name, count in started.items() if name.startswith("layer"))
    print(f"\n{model}, {topology}, batch {batch}, 8,192 tokens: {inside / layers:.2f} kernels a "
          f"layer, {sum(started.values())} a step; temporaries {found.temporaries / 1e6:.1f} MB, "
          f"arguments {found.arguments / 1e9:.1f} GB")  # fmt: skip
    for name, count in sorted(started.items(), key=lambda row: -row[1]):
        print(f"  {count:4}  {name}")
    assert inside / layers <= 10
    for name, (ring, full) in KERNELS.items():
        assert started[name] == layers // 2 * (ring + full)
    ours = sum(layers // 2 * sum(pair) for pair in KERNELS.values())
    assert inside - ours >= layers - 1
    assert sum(started.values()) - inside <= OUTSIDE
    assert found.temporaries < 0.3e9
    assert found.arguments + found.temporaries < slice_.device.memory


@cuda
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("sizes", [{"tensor": 2}, {"expert": 2}])
def test_two_gpus_run_the_same_kernels_and_send_no_weight(sizes):
    config = GptOssConfig.preset("gpt-oss-20b")
    devices = programs.devices(hardware.parse("h200:2"))
    found = programs.Steps(config, sizes, devices).decode(1, 8192)
    assert found.started is not None
    assert found.collectives is not None
    print(f"\n{sizes}: {found.collectives}, temporaries {found.temporaries / 1e6:.1f} MB; "
          f"in all, and with work beside them: {found.overlapped}")  # fmt: skip
    layers = config.num_layers
    for name, count in (
        ("attend_one/shard_map/attention_step", layers),
        ("attend_one/shard_map/attention_combine", layers // 2),
        ("shard_map/expert_mlp/experts_gate_up", layers),
        ("shard_map/expert_mlp/experts_down", layers),
    ):
        assert found.started[f"layer/{name}"] == count
    sent = sum(row["bytes"] for row in found.collectives.values())
    assert sent < 1e-3 * bounds.weights(config, sizes).total
    assert found.temporaries < 0.3e9


@cuda
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The Pallas Triton backend:DeprecationWarning")
@pytest.mark.parametrize("topology", ["h200:1", "a100:1", "l4:1"])
@pytest.mark.parametrize(("step", "batch"), [("decode", 1), ("decode", 8), ("prefill", 1)])
def test_no_kernel_of_a_step_spills(topology, step, batch, tmp_path):
    """Every kernel of a sliding and a full layer and of what is around them, XLA's own too."""
    config = GptOssConfig.preset("gpt-oss-20b")
    config = dataclasses.replace(config, num_layers=2, layer_types=config.layer_types[:2])
    devices = programs.devices(hardware.parse(topology))
    getattr(programs.Steps(config, {}, devices, folder=tmp_path), step)(batch, 8192)
    found = ptx.kernels(tmp_path)
    print(f"\n{topology}, {step}, batch {batch}: registers, shared bytes, spilled bytes")
    for one in sorted(found, key=lambda one: -one.registers):
        print(f"  {one.registers:4} {one.shared:7} {one.spilled:4}  {one.name}")
    names = {one.name.rstrip("0123456789").rstrip("_") for one in found}
    assert {"experts_gate_up", "experts_down"} <= names
    assert {"attention_step", "products"} <= names or (step == "prefill" and "attention" in names)
    assert all(0 < one.registers <= 255 for one in found)
    assert not [one for one in found if one.spilled]
