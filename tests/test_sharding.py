"""Meshes of eight simulated devices: the same logits, gradients and tokens as one device, what the
compiled programs send, what loading reads, and every refusal.
"""

import collections
import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_checkpoints
import tiny
from jax.sharding import PartitionSpec

from gptoss_jax import checkpoint, engine, loading, model, mxfp4, ops, sharding, steps
from gptoss_jax.cache import make_cache
from gptoss_jax.checkpoint.source import Source
from gptoss_jax.config import GptOssConfig
from gptoss_jax.errors import GptOssError
from gptoss_jax.mxfp4 import MxTensor
from gptoss_jax.sampling import Sampling

# Sizes that 8 divides, no two alike; U is 3 and 5, so that a mesh which cut MXFP4 blocks would fail.
CONFIG = dataclasses.replace(
    tiny.CONFIG,
    num_layers=2,
    layer_types=("sliding_attention", "full_attention"),
    num_heads=24,
    num_kv_heads=8,
    head_dim=10,
    num_experts=32,
    intermediate_size=160,
    vocab_size=336,
)
MESHES = ("data=8", "expert=8", "tensor=8", "data=2,expert=4", "expert=2,tensor=4", "fsdp=8")
BATCH, PREFILL, TOTAL = 8, 10, 12
LETTERS = model.letters(CONFIG)
TOKENS = np.random.default_rng(5).integers(0, CONFIG.vocab_size, (BATCH, TOTAL)).astype(np.int32)


def placed(params, mesh):
    return jax.device_put(params, sharding.parameter_shardings(LETTERS, params, mesh))


def mesh_of(text, config=CONFIG):
    mesh = sharding.make_mesh(text, config)
    assert mesh is not None
    return mesh


@functools.lru_cache
def one_expert_params():
    """All tokens choose experts 8 to 11, which one device of expert=8 holds; NaN in all others."""
    params = jax.tree.map(lambda x: x, tiny.params(CONFIG))
    for layer in params["layers"].values():
        bias = np.zeros(CONFIG.num_experts, np.float32)
        bias[8:12] = [8, 7, 6, 5]
        layer["mlp"]["router"] = jnp.zeros_like(layer["mlp"]["router"])
        layer["mlp"]["router_bias"] = jnp.asarray(bias)
        others = jnp.asarray(bias == 0)[:, None]
        layer["mlp"]["down_bias"] = jnp.where(others, jnp.nan, layer["mlp"]["down_bias"])
    return params


def in_two_calls(params, rows, mesh=None):
    """Logits of a prefill and of single tokens after it, as one array."""
    put = jnp.asarray if mesh is None else functools.partial(sharding.put, letters="BT", mesh=mesh)
    cache, found = make_cache(CONFIG, len(rows), 16, jnp.float32), []
    for start, stop in [(0, PREFILL), *((i, i + 1) for i in range(PREFILL, TOTAL))]:
        logits, cache = model.forward(params, put(rows[:, start:stop]), cache, config=CONFIG)
        found.append(np.asarray(logits))
    return np.concatenate(found, axis=1)


@functools.lru_cache
def expected(skewed: bool):
    return in_two_calls(one_expert_params() if skewed else tiny.params(CONFIG), TOKENS)


def assert_close(found, wanted):
    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4 * float(wanted.std()))


@pytest.mark.parametrize("text", MESHES)
def test_logits_of_a_mesh_are_those_of_one_device(text):
    """Prefill and decode, spread routing and all tokens at one expert's device."""
    mesh = mesh_of(text)
    with jax.set_mesh(mesh):
        for skewed in (False, True):
            params = one_expert_params() if skewed else tiny.params(CONFIG)
            assert_close(in_two_calls(placed(params, mesh), TOKENS, mesh), expected(skewed))


def test_a_single_row_is_everywhere_and_each_device_adds_its_experts():
    mesh = mesh_of("expert=8")
    with jax.set_mesh(mesh):
        assert sharding.batch_axes(1) == ()
        found = in_two_calls(placed(one_expert_params(), mesh), TOKENS[:1], mesh)
    assert_close(found, expected(True)[:1])


def loss(params, tokens):
    logits, _ = model.apply(params, tokens, config=CONFIG)
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), tokens[:, 1:, None], axis=2)
    return -chosen.mean()


gradient = jax.jit(jax.grad(loss), compiler_options=tiny.QUICK)


@functools.lru_cache
def expected_gradients():
    plain = tiny.params(CONFIG, packed=False)
    return jax.tree.map(np.asarray, gradient(plain, jnp.asarray(TOKENS)))


@pytest.mark.parametrize("text", ["fsdp=8", "expert=8"])
def test_gradients_of_a_mesh_are_those_of_one_device(text):
    mesh = mesh_of(text)
    params = placed(tiny.params(CONFIG, packed=False), mesh)
    with jax.set_mesh(mesh):
        found = gradient(params, sharding.put(TOKENS, "BT", mesh))
    for keys, wanted in jax.tree_util.tree_leaves_with_path(expected_gradients()):
        leaf = functools.reduce(lambda node, key: node[key.key], keys, found)
        spread = float(np.abs(wanted).max())
        assert spread > 0, keys
        np.testing.assert_allclose(np.asarray(leaf), wanted, rtol=0, atol=1e-4 * spread)


def collectives(text):
    """(kind, element type, sizes) of every collective of a compiled program."""
    found = []
    for line in text.splitlines():
        match = re.search(
            r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute)"
            r"(?:-start)?\(",
            line,
        )
        if match:
            for kind, sizes in re.findall(r"(\w+)\[([\d,]*)\]", match[1]):
                found.append((match[2], kind, tuple(map(int, filter(None, sizes.split(","))))))
    return found


def engine_model(params, mesh=None):
    return engine.Model(CONFIG, params, tiny.tokenizer(CONFIG.vocab_size), 64, mesh=mesh)


PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8]]
SETTINGS = [
    Sampling(temperature=0, logprobs=True, top_logprobs=3),
    Sampling(seed=3, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.1, logit_bias={5: 0.1}),
]


@functools.lru_cache
def expected_completions():
    return engine_model(tiny.params(CONFIG)).generate(PROMPTS, SETTINGS, max_new_tokens=9)


def sums_in_branches(jaxpr, inside=False):
    """Names of the sums over devices in branches of a condition."""
    found = []
    for step in jaxpr.eqns:
        if inside and step.primitive.name.startswith("psum"):
            found.append(step.primitive.name)
        within = inside or step.primitive.name == "cond"
        for part in jax.tree.leaves(step.params, is_leaf=lambda x: hasattr(x, "eqns")):
            part = getattr(part, "jaxpr", part)
            found += sums_in_branches(part, within) if hasattr(part, "eqns") else []
    return found


@pytest.mark.parametrize(
    ("rows", "M", "packed"),
    [((), 8, True), (("data",), 64, False), (("data", "expert"), 64, False)],
)
def test_gradients_of_experts_are_summed_where_all_devices_meet(rows, M, packed):
    """Of everything, few rows and many; a sum in a branch that some devices do not take would wait
    for them for ever.
    """
    generator = np.random.default_rng(M)
    E, D, F, R = 6, 96, 64, 3

    def normal(*shape):
        return jnp.asarray(0.3 * generator.normal(size=shape), jnp.float32)

    gate_up, down = normal(E, F, 2, D), normal(E, D, F)
    ids = jnp.asarray(generator.integers(0, E, (M, 4)), jnp.int32)
    trained = {
        "x": normal(M, D), "shares": normal(M, 4), "biases": (normal(E, F, 2), normal(E, D)),
        "low_rank": {
            "gate_up": ops.LowRank(normal(E, R, D), normal(E, F, 2, R), jnp.ones((1, R))),
            "down": ops.LowRank(normal(E, R, F), normal(E, D, R), jnp.ones((1, R))),
        },
    }  # fmt: skip
    if packed:
        gate_up, down = (mxfp4.pack(np.asarray(x)) for x in (gate_up, down))
    else:
        trained["weights"] = gate_up, down

    def total(trained, held, rows):
        first, second = trained.get("weights", held)
        out = ops.expert_mlp(
            trained["x"], trained["shares"], ids, first, trained["biases"][0], second,
            trained["biases"][1], alpha=1.7, limit=7.0, low_rank=trained["low_rank"], rows=rows,
        )  # fmt: skip
        return jnp.sin(out).sum()

    held = jax.tree.map(jnp.asarray, (gate_up, down))
    gradient = jax.grad(total)
    expected = jax.jit(gradient, static_argnums=2)(trained, held, ())
    with jax.set_mesh(sharding.make_mesh({"data": 4, "expert": 2})):
        traced = jax.jit(gradient, static_argnums=2).trace(trained, held, rows)
        assert not sums_in_branches(traced.jaxpr.jaxpr)
        found = traced.lower().compile()(trained, held)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.abs(b).max()))


@pytest.mark.parametrize("text", ["expert=8", "expert=2,tensor=4"])
def test_generation_on_a_mesh(text, monkeypatch):
    """The tokens of one device; no expert weights and no logits travel; nothing is compiled twice."""
    expected, texts, decode = expected_completions(), [], steps.decode

    def recorded(*arguments, **keywords):
        if not texts:
            texts.append(decode.lower(*arguments, **keywords).compile().as_text())
        return decode(*arguments, **keywords)

    monkeypatch.setattr(steps, "decode", recorded)
    monkeypatch.setattr(engine, "DECODE", 4)
    mesh, before = mesh_of(text), decode._cache_size()
    found = engine_model(placed(tiny.params(CONFIG), mesh), mesh).generate(
        PROMPTS, SETTINGS, max_new_tokens=9
    )
    for one, other in zip(found, expected, strict=True):
        assert one.tokens == other.tokens
    tops = [[id for id, _ in entry.top] for entry in found[0].logprobs]
    assert tops == [[id for id, _ in entry.top] for entry in expected[0].logprobs]
    assert decode._cache_size() - before == 1
    sent = collectives(texts[0])
    assert any(kind == "all-reduce" for kind, _, _ in sent)
    assert not [entry for entry in sent if entry[1] == "u8"]
    widths = {CONFIG.vocab_size, CONFIG.vocab_size // mesh.shape["tensor"]}
    assert not [entry for entry in sent if widths & set(entry[2])]
    largest = max(int(np.prod(sizes)) for kind, _, sizes in sent)
    assert largest <= len(PROMPTS) * CONFIG.hidden_size


def test_the_tables():
    spec = sharding.parameter_spec
    both, layer = ("expert", "tensor"), ("layers", 0)
    fsdp, tensor = ("fsdp",), ("tensor",)
    mlp = (*layer, "mlp")
    assert spec((*mlp, "gate_up", "blocks"), "EFPUY") == PartitionSpec(both, fsdp, None, None, None)
    assert spec((*mlp, "down", "blocks"), "EDUY") == PartitionSpec(both, fsdp, None, None)
    assert spec((*mlp, "gate_up"), "EFPD") == PartitionSpec(both, fsdp, None, None)
    assert spec((*mlp, "down"), "EDF") == PartitionSpec(both, fsdp, None)
    assert spec((*mlp, "router"), "ED") == spec((*mlp, "router_bias"), "E") == PartitionSpec()
    assert spec((*layer, "attention", "o"), "DNH") == PartitionSpec(fsdp, tensor, None)
    assert spec(("unembedding",), "VD") == PartitionSpec(tensor, fsdp)
    mesh = mesh_of("data=2,expert=4")
    assert sharding.activation_spec("BSKH", (8, 5, 8, 10), mesh) == PartitionSpec(
        ("data", "expert"), None, tensor, None
    )
    assert [sharding.batch_axes(n, mesh) for n in (1, 2, 4, 6)] == [
        (),
        ("data",),
        ("data",),
        ("data",),
    ]


def test_without_a_mesh_nothing_happens():
    x = jnp.ones((8, 3))
    assert sharding.constrain(x, "BD") is x
    assert sharding.batch_axes(8) == ()
    assert sharding.make_mesh({}) is sharding.make_mesh("data=1") is None
    assert sharding.choose_mesh(None, CONFIG) is None


@pytest.mark.parametrize(
    ("config", "devices", "sizes"),
    [
        ("gpt-oss-20b", 1, {}),
        ("gpt-oss-20b", 4, {"tensor": 4}),
        ("gpt-oss-20b", 64, {"data": 2, "expert": 4, "tensor": 8}),
        ("gpt-oss-120b", 16, {"expert": 2, "tensor": 8}),
        ("gpt-oss-120b", 6, {"data": 3, "tensor": 2}),
    ],
)
def test_default_sizes(config, devices, sizes):
    config = GptOssConfig.preset(config)
    assert sharding.default_sizes(config, devices) == sizes
    sharding.check(sizes, config)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("expert=3", "expert axis of size 3 does not divide 32 experts: use 1, 2, 4, 8, 16 or 32"),
        ("tensor=5", "tensor axis of size 5 does not divide 8 kv heads: use 1, 2, 4 or 8"),
        (
            "expert=8,tensor=8",
            "tensor axis of size 8 does not divide the 4 experts in each part of the expert axis: "
            "use 1, 2 or 4",
        ),
        (
            {"fsdp": 7},
            "fsdp axis of size 7 does not divide hidden size 96: use 1, 2, 4, 8, 16 or 32",
        ),
        (
            "expert=4,data=1",
            "mesh expert=4,data=1 needs 4 devices, there are 8: use sizes whose product is 8",
        ),
        ("model=8", "mesh axis 'model' is unknown: the axes are data, fsdp, expert and tensor"),
        ("expert=0", "expert axis of size 0: expected a positive integer"),
        ({"expert": 2.0}, "expert axis of size 2.0: expected a positive integer"),
        ("expert", "mesh 'expert': expected axis=size pairs such as expert=4,data=2"),
        ("data=2,data=4", "mesh 'data=2,data=4': expected axis=size pairs such as expert=4,data=2"),
    ],
)
def test_refusals(sizes, message):
    with pytest.raises(GptOssError) as error:
        sharding.make_mesh(sizes, CONFIG)
    assert str(error.value) == message


def test_a_mesh_of_ones_own():
    own = jax.make_mesh((4, 2), ("expert", "data"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    mesh = mesh_of(own)
    assert dict(mesh.shape) == {"data": 2, "fsdp": 1, "expert": 4, "tensor": 1}
    assert mesh.devices[1, 0, 3, 0] == own.devices[3, 1]


def test_saved_on_one_mesh_restored_on_others(tmp_path):
    """The same bits, each device holding its part only."""
    params = tiny.params(CONFIG)
    checkpoint.save_params(tmp_path / "a", CONFIG, placed(params, mesh_of("expert=8")))
    for text in ("expert=2,tensor=4", "fsdp=8"):
        mesh = mesh_of(text)
        wanted = sharding.parameter_shardings(LETTERS, params, mesh)
        _, found = checkpoint.load_params(
            tmp_path / "a", dtype=jnp.float32, shardings=sharding.for_loading(mesh)
        )
        jax.tree.map(lambda x, y: np.testing.assert_array_equal(np.asarray(x), y), found, params)
        same = jax.tree.map(lambda x, s: x.sharding.is_equivalent_to(s, x.ndim), found, wanted)
        assert all(jax.tree.leaves(same))
        gate_up = found["layers"][1]["mlp"]["gate_up"]
        assert isinstance(gate_up, MxTensor)
        parts = {shard.data.nbytes for shard in gate_up.blocks.addressable_shards}
        assert parts == {gate_up.blocks.nbytes // 8}


@pytest.mark.parametrize("ours", [False, True])
def test_a_device_reads_its_experts_and_the_rest(tmp_path, monkeypatch, ours):
    """Bytes for one device of expert=8: an eighth of the experts', plus the rest, each once."""
    case = dataclasses.replace(random_checkpoints.CASES[0], experts=16)
    folder = random_checkpoints.write(tmp_path / "hf", case, "mxfp4")
    if ours:
        config, params = checkpoint.load_params(folder, dtype=jnp.float32)
        folder = tmp_path / "ours"
        checkpoint.save_params(folder, config, params)
    opened = checkpoint.open_checkpoint(folder)
    kind = type(opened)
    assert ours == (kind is not Source)
    reads = collections.defaultdict(list)
    read = kind.read

    def counted(self, leaf, index=None):
        array = read(self, leaf, index)
        reads[leaf.path].append(array.nbytes)
        return array

    monkeypatch.setattr(kind, "read", counted)
    mesh = mesh_of("expert=8", opened.config)
    checkpoint.load_params(folder, dtype=jnp.float32, shardings=sharding.for_loading(mesh))
    assert reads.keys() == {leaf.path for leaf in opened.leaves}
    for leaf in opened.leaves:
        spread = leaf.letters[0] == "E" and leaf.path[3] not in ("router", "router_bias")
        whole = leaf.size * opened.dtype(leaf).itemsize
        assert reads[leaf.path] == ([whole // 8] * 8 if spread else [whole]), leaf.name


def test_scales_in_the_order_that_tpus_are_given_mean_the_same(monkeypatch):
    def laid_out(letters, where):  # as sharding.laid_out on a TPU
        order = sharding.TPU_ORDER.get(letters)
        return where if order is None else sharding.Format(sharding.Layout(order), where)

    plain = loading.load(mesh={"expert": 2, "data": 4}, max_context=512)
    monkeypatch.setattr(sharding, "laid_out", laid_out)
    model = loading.load(mesh={"expert": 2, "data": 4}, max_context=512)
    layouts = [
        leaf.format.layout.major_to_minor
        for leaf in jax.tree.leaves(model.params["layers"][0]["mlp"])
    ]
    assert (0, 2, 3, 1) in layouts
    assert (0, 2, 1) in layouts
    for name in ("gate_up", "down"):
        ours, theirs = (m.params["layers"][1]["mlp"][name].scales for m in (model, plain))
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    settings = Sampling(temperature=0)
    prompts = ["12+34=", "the number is"]
    ours, theirs = (m.generate(prompts, settings, 12) for m in (model, plain))
    assert [c.tokens for c in ours] == [c.tokens for c in theirs]
