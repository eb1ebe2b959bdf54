"""Our logits and rotary frequencies against stored ones of both references; needs no torch.

The files are made by tests/golden/make_golden.py; tests/parity runs the references live.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_checkpoints

from gptoss_jax import ops
from gptoss_jax.cache import make_cache
from gptoss_jax.checkpoint import load_params
from gptoss_jax.config import GptOssConfig
from gptoss_jax.model import forward
from gptoss_jax.ops.rope import frequencies

GOLDEN = Path(__file__).with_name("golden")
# Computed in float64 for theta 150000, factor 32, context 4096, bounds 32 and 1, head size 64.
RELEASED_INVERSE = """
1.0 .689044306 .474782055 .327145872 .225418 .155322989
.107024421 .0737445682 .0508132748 .0317056962 .0193350011 .0115920493
.00679495949 .00386035932 .00209379238 .0010526021 .000456483919 .000129318701
3.83088124e-05 2.6396469e-05 1.81883367e-05 1.25325698e-05 8.63549588e-06 5.95023926e-06
4.09997848e-06 2.82506683e-06 1.94659621e-06 1.34129104e-06 9.2420895e-07 6.36820915e-07
4.38797825e-07 3.02351143e-07
"""
RELEASED_CONCENTRATION = 1.3465735902799727


@dataclasses.dataclass
class Golden:
    """A random model loaded by us, and what the references said about it."""

    case: random_checkpoints.Case
    config: GptOssConfig
    params: dict
    tokens: jax.Array
    exits: np.ndarray
    transformers: np.ndarray
    allowed: float

    def within(self, ours, reference) -> bool:
        """Ours is a float32 rounding away from the reference."""
        assert ours.shape == reference.shape
        return (
            np.abs(np.asarray(ours, np.float64) - reference).max() <= self.allowed * reference.std()
        )


@pytest.fixture(scope="module", params=random_checkpoints.CASES, ids=lambda case: case.name)
def golden(request, tmp_path_factory):
    return _load(request.param, tmp_path_factory.mktemp(request.param.name))


def _load(case, folder) -> Golden:
    with np.load(GOLDEN / f"{case.name}.npz") as stored:
        assert json.loads(str(stored["case"])) == dataclasses.asdict(case), (
            "run tests/golden/make_golden.py again"
        )
        exits, transformers, allowed = (
            stored["exits"],
            stored["transformers"],
            float(stored["allowed"]),
        )
    assert 0 < allowed <= 5e-4
    config, params = load_params(random_checkpoints.write(folder, case, "mxfp4"), dtype="float32")
    tokens = jnp.asarray(random_checkpoints.prompts(case))
    return Golden(case, config, params, tokens, exits, transformers, allowed)


def test_every_layer(golden):
    """The logits are the references'; if not, the first layer that differs is named."""
    if golden.within(_cut(golden, golden.case.layers), golden.exits[-1]):
        assert golden.within(_cut(golden, golden.case.layers), golden.transformers)
        return
    for n in range(1, golden.case.layers + 1):
        assert golden.within(_cut(golden, n), golden.exits[n]), f"differs after {n} layers"


def _first(golden, n):
    """Config and parameters of the first n layers."""
    kinds = golden.config.layer_types[:n]
    config = dataclasses.replace(golden.config, num_layers=n, layer_types=kinds)
    return config, {**golden.params, "layers": {i: golden.params["layers"][i] for i in range(n)}}


def _cut(golden, n):
    """Logits of the model cut after n layers."""
    config, params = _first(golden, n)
    return forward(params, golden.tokens, config=config)[0]


def test_decoding_past_the_window(golden):
    case, found = golden.case, []
    cache = make_cache(golden.config, case.batch, case.tokens, jnp.float32)
    for t in range(case.tokens):
        token = golden.tokens[:, t : t + 1]
        logits, cache = forward(golden.params, token, cache, config=golden.config)
        found.append(logits)
    assert golden.within(jnp.concatenate(found, axis=1), golden.transformers)


def _edit(part: str, name: str, change):
    """A change of one kind of parameter in every layer."""

    def edit(config, params):
        layers = {
            i: {**layer, part: {**layer[part], name: change(layer[part][name])}}
            for i, layer in params["layers"].items()
        }
        return config, {**params, "layers": layers}

    return edit


def _setting(**changes):
    return lambda config, params: (dataclasses.replace(config, **changes), params)


MISTAKES = {
    "no sinks": _edit("attention", "sinks", lambda sinks: sinks - 100.0),
    "sinks of other heads": _edit("attention", "sinks", lambda sinks: jnp.roll(sinks, 1)),
    "window too long": _setting(sliding_window=9),
    "window too short": _setting(sliding_window=7),
    "full layer": _setting(layer_types=("full_attention",)),
    "no yarn": _setting(rope_factor=1.0),
    "wrong yarn bound": _setting(rope_beta_fast=31.0),
    "wrong slope": _setting(swiglu_alpha=1.7),
    "clamp too high": _setting(swiglu_limit=7.01),
    "wrong eps": _setting(rms_norm_eps=1e-6),
    "one expert fewer": _setting(experts_per_token=1),
    "gate and up exchanged": _edit("mlp", "gate_up_bias", lambda bias: bias[..., ::-1]),
    "no router bias": _edit("mlp", "router_bias", jnp.zeros_like),
    "no down bias": _edit("mlp", "down_bias", jnp.zeros_like),
    "no key bias": _edit("attention", "k_bias", jnp.zeros_like),
}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    found = _load(random_checkpoints.CASES[0], tmp_path_factory.mktemp("released"))
    assert found.within(_cut(found, 1), found.exits[1])
    return found


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_outside_the_tolerance(released, mistake):
    """One layer is enough to tell."""
    config, params = MISTAKES[mistake](*_first(released, 1))
    assert not released.within(
        forward(params, released.tokens, config=config)[0], released.exits[1]
    )


def test_frequencies_are_those_of_both_references():
    with np.load(GOLDEN / "rope.npz") as stored:
        names = [name.removesuffix("/settings") for name in stored if name.endswith("/settings")]
        assert len(names) == len(random_checkpoints.CASES) + 1
        for name in names:
            inverse, concentration = frequencies(**json.loads(str(stored[f"{name}/settings"])))
            for reference in ("openai", "transformers"):
                # They work in float32, up to 4 roundings off; a rounded bound is 1e-2 off.
                np.testing.assert_allclose(
                    inverse, stored[f"{name}/{reference}"], rtol=5e-7, err_msg=name
                )
            assert concentration == stored[f"{name}/concentration"], name


def test_frequencies_of_the_released_models():
    config = GptOssConfig.preset("gpt-oss-20b")
    inverse, concentration = frequencies(
        config.head_dim,
        config.rope_theta,
        config.rope_factor,
        config.rope_beta_fast,
        config.rope_beta_slow,
        config.original_context,
    )
    np.testing.assert_allclose(inverse, [float(x) for x in RELEASED_INVERSE.split()], rtol=7e-8)
    assert concentration == pytest.approx(RELEASED_CONCENTRATION, rel=1e-15)


def test_rotation_up_to_the_end_of_the_context():
    with np.load(GOLDEN / "rope.npz") as stored:
        positions, cos, sin = (stored[f"released/{name}"] for name in ("positions", "cos", "sin"))
        inverse, concentration = frequencies(**json.loads(str(stored["released/settings"])))
    found = ops.rotation(jnp.asarray(positions[None], jnp.int32), inverse, concentration)
    # An angle is a float32 product: half an ulp of it, and the references' frequencies 4 ulp off.
    angles = positions[:, None] * inverse.astype(np.float64)
    allowed = 5e-7 * angles * concentration + 1e-6
    for ours, theirs in zip(found, (cos, sin), strict=True):
        assert (np.abs(np.asarray(ours[0]) - theirs) <= allowed).all()
