"""The planner: its arithmetic against real shardings and published figures, its reading of compiled
programs, and the real steps compiled for TPUs and GPUs that are not there.
"""

import importlib
import importlib.util
import json
import math

import jax
import jax.numpy as jnp
import pytest
import tiny
from jax.sharding import NamedSharding

from gptoss_jax import bounds, plan, sharding
from gptoss_jax.cache import cache_bytes
from gptoss_jax.cli import main
from gptoss_jax.config import GptOssConfig
from gptoss_jax.errors import GptOssError
from gptoss_jax.plan import hardware, programs
from gptoss_jax.plan.hlo import collectives, moved

SMALL, LARGE = GptOssConfig.preset("gpt-oss-20b"), GptOssConfig.preset("gpt-oss-120b")
libtpu = pytest.mark.skipif(
    not importlib.util.find_spec("libtpu"), reason="needs libtpu: pip install -e '.[plan]'"
)
cuda = pytest.mark.skipif(
    not importlib.util.find_spec("jax_cuda13_plugin"),
    reason="needs jax's CUDA plugin: pip install -e '.[cuda]'",
)


# ---- arithmetic


def test_weights_are_the_released_ones():
    # openai/gpt-oss-20b and 120b, safetensors: 13.76 and 65.25 GB
    assert bounds.weights(SMALL, {}).total == 13_761_264_768
    assert bounds.weights(LARGE, {}).total == 65_248_815_744
    assert bounds.weights(SMALL, {}, packed=False).total == 2 * 20_914_757_184


@pytest.mark.parametrize(
    "sizes", [{}, {"expert": 8}, {"tensor": 2, "expert": 2, "data": 2}, {"fsdp": 4, "tensor": 2}]
)
def test_weights_of_a_device_are_what_its_shards_weigh(sizes):
    mesh = sharding.make_mesh({"data": 8 // math.prod(sizes.values() or [1]), **sizes})
    total = 0
    for path, axes, shape, dtype in bounds.leaves(SMALL, True):
        where = NamedSharding(mesh, sharding.parameter_spec(path, axes))
        total += math.prod(where.shard_shape(shape)) * dtype.itemsize
    assert bounds.weights(SMALL, sizes).total == total


@pytest.mark.parametrize("batch", [1, 2, 3, 4, 8, 12])
def test_rows_and_cache_of_a_device_are_what_its_shards_hold(batch):
    sizes = {"data": 2, "expert": 2, "tensor": 2}
    mesh = sharding.make_mesh(sizes)
    shape = (batch, 512, SMALL.num_kv_heads, SMALL.head_dim)
    shard = NamedSharding(mesh, sharding.activation_spec("BSKH", shape, mesh)).shard_shape(shape)
    assert bounds.rows_of(batch, sizes) == shard[0]
    assert bounds.cache(SMALL, sizes, batch, 512) == cache_bytes(SMALL, batch, 512) * math.prod(
        shard
    ) // math.prod(shape)


def test_a_decode_step_at_batch_1_moves_what_the_model_card_implies():
    # 3.61 and 5.13 billion active parameters (OpenAI's model card); 3.71 and 5.00 GB with an empty cache
    assert bounds.step(SMALL, {}, 1, 1, 1).bytes == pytest.approx(3.71e9, rel=0.01)
    assert bounds.step(LARGE, {}, 1, 1, 1).bytes == pytest.approx(5.00e9, rel=0.01)
    assert bounds.step(SMALL, {}, 1, 1, 1).flops == pytest.approx(2 * 3.61e9, rel=0.002)
    assert bounds.step(LARGE, {}, 1, 1, 1).flops == pytest.approx(2 * 5.13e9, rel=0.002)
    longer = bounds.step(SMALL, {}, 1, 1, 8192).bytes - bounds.step(SMALL, {}, 1, 1, 128).bytes
    assert longer == 12 * (8192 - 128) * 2 * 8 * 64 * 2


def test_busiest_device_reads_more_than_its_share_of_experts():
    assert bounds.busiest(SMALL, {}, 1) == 4
    assert bounds.busiest(SMALL, {"expert": 32}, 1) == 1
    assert 1 < bounds.busiest(SMALL, {"expert": 4}, 1) < 4
    assert bounds.busiest(SMALL, {"expert": 4}, 4096) == 8
    # all devices together: E (1 - (1 - X/E)^B)
    expected = 32 * (1 - (1 - 4 / 32) ** 6)
    assert bounds.busiest(SMALL, {}, 6) == pytest.approx(expected, rel=0.03)


def test_operations_of_a_chunk_are_those_of_a_compiled_dense_forward():
    """XLA's own count of the matrix products of a model whose experts are all used."""
    config = tiny.CONFIG
    D, F, N, K, H, V = (
        config.hidden_size,
        config.intermediate_size,
        config.num_heads,
        config.num_kv_heads,
        config.head_dim,
        config.vocab_size,
    )
    S, T = 64, 8

    def products(x, q, k, o, router, up, down, keys, vocabulary):
        for _ in config.layer_types:
            a = jnp.einsum("TD,DN->TN", x, q)
            b = jnp.einsum("TD,DK->TK", x, k)
            scores = jnp.einsum("TNH,SNH->NTS", a.reshape(T, N, H), keys)
            c = jnp.einsum("NTS,SNH->TNH", scores, keys).reshape(T, N * H)
            x = jnp.einsum("TN,ND->TD", c, o) + b.sum()
            x = x + jnp.einsum("TD,DE->TE", x, router).sum()
            for _ in range(config.experts_per_token):
                x = jnp.einsum("TF,FD->TD", jnp.einsum("TD,DF->TF", x, up)[:, :F], down)
        return jnp.einsum("D,DV->V", x[-1], vocabulary)

    shapes = [
        (T, D),
        (D, N * H),
        (D, 2 * K * H),
        (N * H, D),
        (D, config.num_experts),
        (D, 2 * F),
        (F, D),
        (S, N, H),
        (D, V),
    ]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    counted = jax.jit(products).lower(*arrays).compile().cost_analysis()["flops"]
    ours = bounds.step(config, {}, 1, T, S).flops
    seen = sum(
        S - (T - 1) / 2 - min(config.sliding_window, S) if kind == "sliding_attention" else 0
        for kind in config.layer_types
    )
    ours += 4 * T * N * H * (seen + config.layer_types.count("full_attention") * (T - 1) / 2)
    ours += 4 * T * N * H * config.layer_types.count("sliding_attention") * (T - 1) / 2
    assert ours == pytest.approx(counted, rel=0.03)  # XLA also counts the additions


def test_meshes_are_all_that_the_model_allows_and_use_all_devices():
    found = plan.meshes_for(LARGE, 16)
    assert {"expert": 16} in found
    assert {"expert": 2, "tensor": 8} in found
    assert all(math.prod(mesh.values()) == 16 for mesh in found)
    assert not [mesh for mesh in found if mesh.get("tensor", 1) > 8]
    assert plan.meshes_for(LARGE, 1) == [{}]


# ---- programs' text


def test_collectives_of_a_compiled_program_are_counted_with_their_loops():
    mesh = sharding.make_mesh({"tensor": 8})

    def f(x):
        def body(x, _):
            y = jax.lax.psum(x, "tensor")  # 3 times [2, 16] float32
            return x + y * jax.lax.axis_index("tensor").astype(jnp.float32), None

        x, _ = jax.lax.scan(body, x, None, length=3)
        return jax.lax.all_gather(x.astype(jnp.bfloat16), "tensor", tiled=True)

    spread = jax.shard_map(
        f,
        mesh=mesh,
        in_specs=jax.sharding.PartitionSpec("tensor"),
        out_specs=jax.sharding.PartitionSpec("tensor"),
    )
    text = jax.jit(spread).lower(jax.ShapeDtypeStruct((16, 16), jnp.float32)).compile().as_text()
    found = collectives(text)
    assert found["all-reduce"] == {"count": 3, "bytes": 3 * 2 * 16 * 4}
    assert found["all-gather"]["count"] == 1
    assert found["all-gather"]["bytes"] in (16 * 16 * 2, 16 * 16 * 4)  # CPUs may widen bfloat16


def test_collectives_in_a_tpus_words():
    text = """HloModule jit_f, is_scheduled=true

%body.1 (p: (f32[8,128], s32[])) -> (f32[8,128], s32[]) {
  %all-reduce-start.1 = f32[8,128]{1,0:T(8,128)} all-reduce-start(%x), channel_id=2, to_apply=%add.1
  %all-reduce-done.1 = f32[8,128]{1,0:T(8,128)} all-reduce-done(%all-reduce-start.1)
  %fusion.2 = bf16[4,16]{1,0} fusion(%y), kind=kCustom, calls=%scattered.2
}

%scattered.2 (p: bf16[16,16]) -> bf16[4,16] {
  ROOT %reduce-scatter.3 = bf16[4,16]{1,0} reduce-scatter(%p), channel_id=3, to_apply=%add.1
}

ENTRY %main (a: f32[8,128]) -> f32[8,128] {
  %while.1 = (f32[8,128], s32[]) while(%t), condition=%cond.1, body=%body.1, backend_config={"known_trip_count":{"n":"5"}}
  %all-gather-start.4 = (f32[2,128]{1,0}, f32[8,128]{1,0}) all-gather-start(%b), dimensions={0}
  %conditional.5 = f32[1] conditional(%i, %l, %r), branch_computations={%left.1, %right.1}
}

%left.1 (p: f32[1]) -> f32[1] {
  %all-reduce.9 = f32[1]{0} all-reduce(%p), to_apply=%add.1
}
"""
    assert collectives(text) == {
        "all-reduce": {"count": 6, "bytes": 5 * 4096 + 4},
        "reduce-scatter": {"count": 5, "bytes": 5 * 128},
        "all-gather": {"count": 1, "bytes": 4096},
    }


def test_bytes_moved_count_parts_as_parts_and_fast_memory_as_nothing():
    text = """HloModule jit_f, is_scheduled=true

%cut.1 (p: bf16[64,128], i: s32[]) -> bf16[1,128] {
  %p = bf16[64,128]{1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)} parameter(1)
  ROOT %dynamic-slice.1 = bf16[1,128]{1,0:T(8,128)(2,1)S(1)} dynamic-slice(%p, %i, %i), dynamic_slice_sizes={1,128}
}

%body.1 (t: (bf16[64,128], s8[4,1000])) -> (bf16[64,128], s8[4,1000]) {
  %t = (bf16[64,128]{1,0}, s8[4,1000]{1,0}) parameter(0)
  %table = bf16[64,128]{1,0:T(8,128)(2,1)} get-tuple-element(%t), index=0
  %held = s8[4,1000]{1,0:T(8,128)(4,1)} get-tuple-element(%t), index=1
  %at = s32[]{:T(128)S(6)} constant(3)
  %fusion.1 = bf16[1,128]{1,0:T(8,128)(2,1)S(1)} fusion(%table, %at), kind=kLoop, calls=%cut.1
  %slice-start.1 = ((bf16[64,128]{1,0}), bf16[16,128]{1,0:S(1)}, s32[]{:S(2)}) async-start(%table), calls=%async.1
  %slice-done.1 = bf16[16,128]{1,0:S(1)} async-done(%slice-start.1)
  %add.1 = bf16[64,128]{1,0:S(1)} add(%slice-done.1, %slice-done.1)
  %experts.7 = f32[8]{0} custom-call(%add.1, %held), custom_call_target="tpu_custom_call"
  %dynamic-update-slice.2 = bf16[64,128]{1,0} dynamic-update-slice(%table, %row, %at, %at)
  %row = bf16[2,128]{1,0} copy(%add.1)
}

ENTRY %main (a: bf16[64,128]) -> bf16[64,128] {
  %while.1 = (bf16[64,128], s8[4,1000]) while(%t), condition=%cond.1, body=%body.1
}
"""
    assert moved(text, "tpu_custom_call", {"experts": 0.25}) == {
        "fusion": 128 * 2,
        "async": 16 * 128 * 2,
        "experts": 32 + 1000,
        "dynamic-update-slice": 2 * 128 * 2,
        "copy": 2 * 128 * 2,
    }


# ---- what is refused, and the answer without a compiler


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("v9:2x2", "v9 is no device known here: use one of v5e"),
        ("v6e", "expected v6e and chips along 2 axes, as in v6e:2x4"),
        ("v5p:2x2", "expected v5p and chips along 3 axes, as in v5p:2x2x1"),
        ("h100:2x2", "expected h100 and a number of GPUs, as in h100:8"),
        ("h100:0", "expected h100 and a number of GPUs"),
    ],
)
def test_unknown_topologies_are_refused(topology, message):
    with pytest.raises(GptOssError, match=message):
        hardware.parse(topology)


def test_wrong_meshes_contexts_and_batches_are_refused():
    with pytest.raises(GptOssError, match="needs 8 devices, v6e:2x2 has 4"):
        plan.plan(SMALL, "v6e:2x2", mesh="expert=8")
    with pytest.raises(GptOssError, match="does not divide 8 kv heads"):
        plan.plan(SMALL, "v5e:4x4", mesh={"tensor": 16})
    with pytest.raises(GptOssError, match="context of 200000: this model's is 1 to 131072"):
        plan.plan(SMALL, "v6e:2x2", context=200_000)
    with pytest.raises(GptOssError, match="batch of 0"):
        plan.plan(SMALL, "v6e:2x2", batch=0)


@pytest.fixture
def no_compiler(monkeypatch):
    real = importlib.import_module

    def without(name, *args):
        if name == "libtpu" or name.startswith("jax_plugins"):
            raise ModuleNotFoundError(f"No module named {name!r}")
        return real(name, *args)

    monkeypatch.setattr(programs.importlib, "import_module", without)


def test_without_a_compiler_arithmetic_answers_and_says_which_extra_is_missing(no_compiler, capsys):
    assert (
        main.main(["plan", "gpt-oss-120b", "--topology", "v6e:2x2", "--context", "8192", "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert found["compiled"] is False
    assert found["compiler"] == "not compiled: pip install 'gptoss_jax[plan]' brings the compiler"
    assert found["mesh"] == {"tensor": 4}
    main.main(["plan", "gpt-oss-20b", "--topology", "h100:1", "--context", "8192"])
    assert "pip install 'gptoss_jax[cuda]'" in " ".join(capsys.readouterr().out.split())


def test_what_does_not_fit_says_what_would(no_compiler, capsys):
    assert main.main(["plan", "gpt-oss-120b", "--topology", "v5e:2x2"]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert "does not fit (context 131,072, batch 1) with --mesh tensor=4" in out
    found = plan.plan(LARGE, "v5e:2x2")
    assert 0 < found.largest_context < 131072
    assert plan.plan(LARGE, "v5e:2x2", context=found.largest_context).best.fits
    assert not plan.plan(LARGE, "v5e:2x2", context=found.largest_context + 1).best.fits
    assert found.largest_batch == 0
    assert "8 of these devices would do" in _verdict(plan.plan(LARGE, "v5e:1x1"))
    assert _verdict(plan.plan(LARGE, "l4:1")).endswith("of these devices would do")


def _verdict(found):
    from gptoss_jax.cli.plan import verdict

    return verdict(found)


def test_largest_batch_is_the_largest(no_compiler):
    found = plan.plan(SMALL, "v6e:1x1", context=8192)
    assert plan.plan(SMALL, "v6e:1x1", context=8192, batch=found.largest_batch).best.fits
    assert not plan.plan(SMALL, "v6e:1x1", context=8192, batch=found.largest_batch + 1).best.fits


def test_the_plot_is_a_picture(no_compiler, tmp_path, capsys):
    file = tmp_path / "memory.png"
    assert main.main(["plan", "gpt-oss-120b", "--topology", "v6e:2x2", "--plot", str(file)]) == 0
    assert file.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


# ---- the real steps, compiled for devices that are not there


def check(
    config, topology: str, sizes: dict[str, int], batch: int, context: int, names=("decode",)
):
    """Compiles; temporaries of decode stay under a tenth of the weights: no bfloat16 copy of the
    experts is made, of the cache neither.
    """
    slice_ = hardware.parse(topology)
    steps = programs.Steps(config, sizes, programs.devices(slice_))
    found = {name: getattr(steps, name)(batch, context) for name in names}
    held = bounds.weights(config, sizes).total
    decode = found["decode"]
    assert decode.temporaries < 0.1 * held
    assert decode.arguments == pytest.approx(
        held + bounds.cache(config, sizes, batch, context), rel=0.03
    )
    assert decode.arguments + decode.temporaries < slice_.device.memory
    if sizes.get("expert", 1) * sizes.get("tensor", 1) > 1:
        assert decode.collectives["all-reduce"]["count"] >= config.num_layers
        gathered = decode.collectives.get("all-gather", {"bytes": 0})["bytes"]
        assert gathered < 1e-4 * held  # never a weight
    return found


@libtpu
def test_two_layers_of_120b_decode_on_a_v6e_slice():
    import dataclasses

    config = dataclasses.replace(LARGE, num_layers=2, layer_types=LARGE.layer_types[:2])
    check(config, "v6e:2x2", {"expert": 2, "tensor": 2}, 2, 1024)


@libtpu
def test_a_slice_that_nobody_rents_is_refused():
    with pytest.raises(GptOssError, match="topology 'v6e:3x3': the compiler refuses it"):
        programs.devices(hardware.parse("v6e:3x3"))


@libtpu
@pytest.mark.slow
@pytest.mark.parametrize("context", [8192, 131072])
@pytest.mark.parametrize(
    ("config", "topology", "sizes"),
    [
        (SMALL, "v6e:1x1", {}),
        (SMALL, "v5e:2x2", {"tensor": 4}),
        (LARGE, "v6e:2x2", {"tensor": 4}),
        (LARGE, "v6e:2x2", {"expert": 4}),
        (LARGE, "v5e:4x4", {"expert": 2, "tensor": 8}),
        (LARGE, "v5p:2x2x1", {"tensor": 4}),
    ],
    ids=["20b-v6e-1", "20b-v5e-4", "120b-v6e-4", "120b-v6e-4-expert", "120b-v5e-16", "120b-v5p-4"],
)
def test_decode_compiles_for_tpus_and_makes_no_copies(config, topology, sizes, context):
    check(config, topology, sizes, 1, context)


@libtpu
@pytest.mark.slow
def test_plan_answers_for_120b_in_three_minutes(capsys):
    import time

    started = time.perf_counter()
    assert (
        main.main(
            ["plan", "gpt-oss-120b", "--topology", "v6e:2x2", "--context", "131072", "--json"]
        )
        == 0
    )
    seconds = time.perf_counter() - started
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is True
    assert found["compiled"] is True
    assert set(found["programs"]) == {"decode", "prefill"}
    assert found["programs"]["prefill"]["collectives"]["all-reduce"]["count"] >= LARGE.num_layers
    assert found["memory"]["peak"] < found["device"]["memory"]
    print(f"plan: {seconds:.0f} s")
    assert seconds < 180


@cuda
@pytest.mark.slow
def test_120b_decodes_on_one_h100():
    found = check(LARGE, "h100:1", {}, 1, 8192)
    assert found["decode"].temporaries < 0.01 * bounds.weights(LARGE, {}).total
