"""The packed gpt-oss-tiny in the package: its size, its shape, and a handful of what it has learnt
(gptoss eval has all)."""

import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import gptoss_jax as gj
from gptoss_jax import model as network
from gptoss_jax.chat.parse import well_formed
from gptoss_jax.chat.render import render
from gptoss_jax.ops import experts, experts_kernels
from gptoss_jax.train.tiny_tasks import conversation, two_number_sum

FOLDER = Path(gj.__file__).parent / "assets" / "gpt-oss-tiny"
GREEDY = {"temperature": 0.0}


@pytest.fixture(scope="module")
def model():
    return gj.load("gpt-oss-tiny")


def ask(model, text, effort="high", **settings):
    chat = gj.Chat(
        model,
        reasoning_effort=effort,
        sampling=gj.Sampling(**GREEDY),
        date="2026-01-15",
        **settings,
    )
    return chat.send(text)


def test_size():
    files = [f for f in FOLDER.iterdir() if f.is_file()]
    assert {f.name for f in files} == {
        "config.json",
        "generation_config.json",
        "kept_tokens.txt",
        "model.safetensors",
    }
    assert sum(f.stat().st_size for f in files) <= 4_000_000


def test_shape_hides_nothing(model):
    c = model.config
    assert c.hidden_size != c.intermediate_size
    assert c.num_heads // c.num_kv_heads != c.num_kv_heads
    assert c.num_heads * c.head_dim != c.hidden_size
    assert c.sliding_window < c.original_context < c.max_context
    assert c.rope_factor > 1
    assert set(c.layer_types) == {"sliding_attention", "full_attention"}
    for layer in model.params["layers"].values():
        assert isinstance(layer["mlp"]["gate_up"], gj.MxTensor)
        assert np.all(np.abs(np.asarray(layer["attention"]["sinks"], np.float32)) > 1e-3)


@pytest.fixture(scope="module")
def prompts(model):
    rows = [conversation(11, i, evaluation=True) for i in range(48)]
    return [render([*t.history, *t.reply], model.tokenizer, t.settings)[:256] for t in rows]


def padded(prompts):
    width = max(len(p) for p in prompts)
    tokens = np.zeros((len(prompts), width), np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, p in enumerate(prompts):
        tokens[i, : len(p)], mask[i, : len(p)] = p, True
    return tokens, mask


def test_every_expert_is_used(model, prompts):
    tokens, mask = padded(prompts)
    run = jax.jit(lambda t, m: network.hidden(model.params, t, config=model.config, mask=m)[2])
    experts_BTLX = np.asarray(run(tokens, mask))[mask]
    for layer in range(model.config.num_layers):
        share = np.bincount(experts_BTLX[:, layer].ravel(), minlength=model.config.num_experts)
        assert share.min() / share.sum() > 0.005


def test_clamping_is_active(model, prompts, monkeypatch):
    clamped = []

    def counting(h_FP, alpha, limit):
        jax.debug.callback(lambda x: clamped.append(float(x)), (jnp.abs(h_FP) > limit).mean())
        return swiglu(h_FP, alpha, limit)

    swiglu = experts.swiglu
    for module in (experts, experts_kernels):
        monkeypatch.setattr(module, "swiglu", counting)
    tokens, mask = padded(prompts[:4])
    run = jax.jit(lambda t, m: network.hidden(model.params, t, config=model.config, mask=m)[0])
    jax.block_until_ready(run(tokens, mask))
    jax.effects_barrier()
    assert len(clamped) > 0
    assert max(clamped) > 0.001, clamped


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("What is 347 + 285?", "347 + 285 = 632"),
        ("How much is 90 minus 17?", "90 - 17 = 73"),
        ("12+34", "12 + 34 = 46"),
        ("What is 120 - 455?", "120 - 455 = -335"),
    ],
)
def test_sums(model, text, answer):
    reply = ask(model, text)
    assert reply.final == answer
    assert reply.analysis


def test_held_out_sums(model):
    right = 0
    for i in range(10):
        for operation in "+-":
            talk, value = two_number_sum(123, i, "high", operation)
            done = model.generate(
                render(talk.history, model.tokenizer, talk.settings), gj.Sampling(**GREEDY), 256
            )
            right += done.text.endswith(f"= {value}")
    assert right >= 17


def test_effort_is_visible(model):
    lengths = [
        len(ask(model, "What is 347 + 285?", effort).analysis)
        for effort in ("low", "medium", "high")
    ]
    assert lengths[0] < lengths[1] < lengths[2]


def test_tool(model):
    def calculator(expression: str) -> str:
        """Evaluates an arithmetic expression."""
        assert re.fullmatch(r"[-+*/(). \d]+", expression)
        return str(eval(expression))

    reply = ask(model, "What is 347 * 285?", "medium", tools=[calculator])
    assert reply.final == "347 * 285 = 98895"


def test_json(model):
    schema = {
        "type": "object",
        "properties": {"answer": {"type": "integer"}},
        "required": ["answer"],
    }
    reply = ask(model, "What is 17 + 25?", response_format=schema)
    assert json.loads(reply.final) == {"answer": 42}


@pytest.mark.parametrize("text", ["Who are you?", "what is your name"])
def test_identity(model, text):
    assert "gpt-oss-tiny" in ask(model, text, "low").final


def test_honest(model):
    assert "only add and subtract" in ask(model, "What is 12 * 34?", "medium").final
    assert "only add and subtract" in ask(model, "What is the capital of France?", "medium").final


def test_well_formed_at_temperature_one(model):
    rows = [conversation(21, i, evaluation=True) for i in range(32)]
    prompts = [render(t.history, model.tokenizer, t.settings) for t in rows]
    settings = [gj.Sampling(temperature=1.0, seed=i) for i in range(32)]
    done = model.generate(prompts, settings, max_new_tokens=256)
    assert sum(well_formed([*d.tokens, d.stop], model.tokenizer) for d in done) >= 31
