"""Adapters row by row, and a mesh: every request gets what generate gives on one device."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import NamedSharding
from test_batching import Only, compilations, run, workload

from gptoss_jax import lora, sharding
from gptoss_jax.batching import Engine, EngineSettings, Request
from gptoss_jax.lora import LoraConfig
from gptoss_jax.model import letters
from gptoss_jax.sampling import Sampling

CONFIG = tiny.SMALL
SETTINGS = EngineSettings(slots=4, max_context=128, chunk=16, max_queue=50)
NAMES = (None, "one", "two")


def adapted(mesh=None):
    """The test model with two adapters, on one device or a mesh."""
    rng = np.random.default_rng(0)
    found = {}
    for name, config in (("one", LoraConfig(rank=3)), ("two", LoraConfig(rank=2, targets=("q",)))):
        shapes = lora.shapes(CONFIG, config)
        tree = jax.tree.map(lambda x: 0.2 * rng.normal(size=x.shape).astype(np.float32), shapes)
        found[name] = tree, config

    def put(path, axes, array):
        if mesh is None:
            return jnp.asarray(array)
        return jax.device_put(array, NamedSharding(mesh, sharding.parameter_spec(path, axes)))

    params = tiny.params(CONFIG)
    if mesh is not None:
        where = sharding.parameter_shardings(letters(CONFIG), params, mesh)
        params = jax.device_put(params, where)
    stack = lora.stack(found, jnp.float32, put)
    return tiny.model(config=CONFIG, params=params, mesh=mesh, adapters=stack)


def requests():
    some = [
        dataclasses.replace(r, prompt=r.prompt[:40], max_new_tokens=12, adapter=NAMES[i % 3])
        for i, r in enumerate(workload(9))
    ]
    same = [dataclasses.replace(some[1], prompt=list(range(40)), adapter=name) for name in NAMES]
    return some + same


@pytest.fixture(scope="module")
def expected():
    """What generate gives, for each request by itself in one batch."""
    several = requests()
    found = adapted().generate(
        [r.prompt for r in several],
        [r.sampling for r in several],
        [r.max_new_tokens for r in several],
        adapter=[r.adapter for r in several],
    )
    return [c if isinstance(c, list) else [c] for c in found]


@pytest.mark.parametrize("text", ["", "data=2,expert=2"])
def test_requests_get_what_generate_gives(expected, text):
    devices = jax.devices()[:4]
    mesh = sharding.make_mesh(text, CONFIG, devices) if text else None
    engine = Engine(adapted(mesh), SETTINGS)
    engine.warm_up()
    assert engine.adapters == ("one", "two")
    with compilations() as compiled:
        found = run(engine, requests())
        again = run(engine, requests())
        mask = Only([(2, 0), (3, 1)])
        masked = Request(list(range(30)), Sampling(seed=1, ignore_eos=True), 10, masks=[mask])
        assert run(engine, [masked])[0][0].tokens == mask.accepted
    assert not compiled
    for several in (found, again):
        for a, b in zip(several, expected, strict=True):
            assert [c.tokens for c in a] == [c.tokens for c in b]
    assert len({tuple(c[0].tokens) for c in found[-3:]}) == 3  # pages know their adapter
    assert engine.statistics()["cached_tokens_total"] > 0
    engine.close()
