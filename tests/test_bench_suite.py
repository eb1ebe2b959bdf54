"""Suites: rows run one after another, a goal is judged by its figure, and nothing that fails is a
figure; what accelerators draw and compare by themselves.
"""

import contextlib
import json
import sys
import types

import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import gptoss_jax as gj
from gptoss_jax.bench import agreement, peer_triton, suite, weights
from gptoss_jax.cli import main
from gptoss_jax.config import GptOssConfig
from gptoss_jax.errors import GptOssError

ROWS = (
    suite.Row("fast", "gpt-oss-20b", {"batch": 1}, {"decode_tok_s": (">=", 100.0)}),
    suite.Row("small", "gpt-oss-120b", {"batch": 8}, {"memory.device": ("<=", 5.0)}),
    suite.Row("other", "gpt-oss-20b", {}, module="nowhere", needs=("no_such_module",)),
    suite.Row("silent", "gpt-oss-20b", {"batch": 2}, {"share.decode": (">=", 1.0)}),
)


def test_rows_run_in_order_and_are_judged(monkeypatch):
    monkeypatch.setitem(suite.MISSING, "no_such_module", "pip install it")
    reports = iter([{"decode_tok_s": 99.0}, {"memory": {"device": 5}}, {"share": None}])
    ran = []

    def child(command, seconds):
        ran.append((command[command.index("--model") + 1], command[-2:]))
        assert 0 < seconds <= 50
        return next(reports)

    found = suite.run(ROWS, layers=2, seconds=50, child=child)["rows"]
    assert [model for model, _ in ran] == ["gpt-oss-20b", "gpt-oss-120b", "gpt-oss-20b"]
    assert {tuple(end) for _, end in ran} == {("--layers", "2")}
    judged = [row.get("goals", row.get("missing")) for row in found]
    assert judged[0] == {"decode_tok_s": {"value": 99.0, "goal": 100.0, "sign": ">=", "met": False}}
    assert judged[1]["memory.device"]["met"] is True
    assert judged[2] == "not installed: pip install it"
    assert judged[3]["share.decode"] == {"value": None, "goal": 1.0, "sign": ">=", "met": None}


def test_what_fails_or_finds_no_time_is_named(monkeypatch):
    clock = iter([0.0, 0.0, 30.0, 45.0, 45.0])
    monkeypatch.setattr(suite, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))

    def child(command, seconds):
        if seconds == 50:
            raise GptOssError("the process failed: out of memory")
        return {"decode_tok_s": 100.0}

    rows = (ROWS[0], ROWS[0], ROWS[0])
    found = suite.run(rows, seconds=50, child=child)["rows"]
    assert [row.get("missing") for row in found] == [
        "the process failed: out of memory",
        None,
        "not measured: 50 s were over",
    ]
    assert found[1]["goals"]["decode_tok_s"]["met"]


def test_every_row_of_the_suites_is_a_command_that_bench_takes(monkeypatch, capsys):
    ran = []
    monkeypatch.setattr(suite, "_child", lambda command, seconds: ran.append(command) or {})
    monkeypatch.setattr(suite.importlib.util, "find_spec", lambda name: name)
    assert main.main(["bench", "--suite", "h200", "--layers", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(ran) == len(found["rows"]) == len(suite.SUITES["h200"])
    for command in ran:
        if command[2] == "gptoss_jax.cli.main":
            with pytest.raises(SystemExit) as ended:
                main.main([*command[3:], "--help"])
            assert ended.value.code == 0
        else:
            assert suite.importlib.import_module(command[2]).main


def test_a_child_that_fails_says_why_and_one_that_lasts_is_ended():
    with pytest.raises(GptOssError, match="no such"):
        suite._child(["sh", "-c", "echo no such >&2; exit 1"], 20)
    with pytest.raises(GptOssError, match="time was over"):
        suite._child(["sleep", "20"], 0.1)
    assert suite._child(["sh", "-c", 'echo one; echo "{}"'], 20) == {}


def test_devices_draw_what_a_processor_fills():
    plain = np.asarray(weights.draw((60, 70), jnp.bfloat16, "q", 1), np.float32)
    assert (np.abs(plain) >= 2**-7).all()
    assert (np.abs(plain) < 2**-5).all()
    assert abs((plain < 0).mean() - 0.5) < 0.05
    assert len(np.unique(plain)) > 500
    assert (np.asarray(weights.draw((60, 70), jnp.bfloat16, "q", 2)) != plain).mean() > 0.9
    blocks = np.asarray(weights.draw((4, 50, 3, 16), jnp.uint8, "blocks", 1))
    assert len(np.unique(blocks)) == 256
    assert set(np.unique(weights.draw((4, 50, 3), jnp.uint8, "scales", 1))) == {118, 119, 120, 121}
    assert (np.asarray(weights.draw((7,), jnp.float32, "norm", 1)) == 1).all()


def test_kernels_and_definition_are_compared_beside_float32(monkeypatch):
    config = tiny.SMALL
    params = weights.random_params(config)
    model = gj.Model(config, params, tiny.tokenizer(), config.max_context)
    found = agreement.agreement(model, ((2, 1), (1, 30)))
    assert 0 < found["plain"] < 0.5
    assert found["error_ratio"] < 2
    right = agreement._logits

    def wrong(params, tokens, config, backend=None):
        return right(params, tokens, config, backend) * (1 if backend else -1)

    monkeypatch.setattr(agreement, "_logits", wrong)
    assert agreement.agreement(model, ((2, 1),))["error_ratio"] > 2


# ---- OpenAI's triton implementation, whose kernels need a GPU


def test_openais_settings_are_those_of_the_config():
    """Names as gpt_oss.torch.model.ModelConfig has them; it is in the parity extra's environment."""
    theirs = peer_triton.settings(GptOssConfig.preset("gpt-oss-120b").to_hf())
    assert theirs == {
        "num_hidden_layers": 36, "num_experts": 128, "experts_per_token": 4, "vocab_size": 201088,
        "hidden_size": 2880, "intermediate_size": 2880, "swiglu_limit": 7.0, "head_dim": 64,
        "num_attention_heads": 64, "num_key_value_heads": 8, "sliding_window": 128,
        "initial_context_length": 4096, "rope_theta": 150000, "rope_scaling_factor": 32,
        "rope_ntk_alpha": 1, "rope_ntk_beta": 32,
    }  # fmt: skip


class FakeTriton:
    """Of gpt_oss.triton what the program uses: places to fill, caches that grow, logits."""

    def __init__(self, torch, config):
        mx = [
            types.SimpleNamespace(
                storage=types.SimpleNamespace(data=torch.full((2, 3), 255, dtype=torch.uint8))
            )
            for _ in range(2)
        ]
        self.block = [
            types.SimpleNamespace(
                mlp=types.SimpleNamespace(mlp1_weight_mx=mx[0], mlp2_weight_mx=mx[1])
            )
        ] * config.num_hidden_layers
        self.scales, self.calls, self.torch = mx, [], torch
        self.named = {
            "block.0.attn.norm.scale": torch.ones(4),
            "block.0.attn.sinks": torch.full((4,), float("nan"), dtype=torch.bfloat16),
            "block.0.mlp.mlp1_weight": torch.zeros((40, 50), dtype=torch.uint8),
        }

    def eval(self):
        return self

    def named_parameters(self):
        return [
            (name, types.SimpleNamespace(data=x, is_floating_point=x.is_floating_point))
            for name, x in self.named.items()
        ]

    def __call__(self, tokens, caches):
        self.calls.append((tuple(tokens.shape), caches[0].taken))
        for cache in caches:
            cache.taken += tokens.shape[1]
            assert cache.taken <= cache.size
        logits = self.torch.zeros((*tokens.shape, 7))
        logits[..., len(self.calls) % 7] = 1
        return logits


def test_openais_implementation_is_filled_and_timed(capsys):
    torch = pytest.importorskip("torch")
    made, graphs, seen = [], [], []

    class Cache:
        def __init__(self, batch, size, heads, width, device):
            self.batch, self.size, self.taken = batch, size, 0
            seen.append(self)
            assert (heads, width, device) == (2, 8, "cuda")

        def reset(self):
            self.taken = 0

    class Graph:
        replays = 0

        def replay(self):
            self.replays += 1

    def transformer(config, device):
        made.append(FakeTriton(torch, config))
        return made[0]

    @contextlib.contextmanager
    def capture(graph):
        graphs.append(graph)
        yield

    def on_cpu(make):
        return lambda *parts, device, **rest: make(*parts, **rest)

    cuda = types.SimpleNamespace(synchronize=lambda: None, CUDAGraph=Graph, graph=capture)
    fake = types.SimpleNamespace(
        manual_seed=torch.manual_seed, device=lambda name: name, cuda=cuda, int32=torch.int32,
        randint=on_cpu(torch.randint), zeros=on_cpu(torch.zeros),
    )  # fmt: skip
    given = types.SimpleNamespace(
        config=dict(GptOssConfig.preset("gpt-oss-20b").to_hf(), num_hidden_layers=2, num_key_value_heads=2, head_dim=8, vocab_size=7),
        batch=3, prompt=5, new=4, repeats=2, threads=1,
    )  # fmt: skip
    peer_triton.run(given, fake, lambda **s: types.SimpleNamespace(**s), Cache, transformer)
    line = json.loads(capsys.readouterr().out)
    assert line["system"] == "gpt-oss triton"
    assert line["prefill_tok_s"] > 0
    assert line["decode_tok_s"] > 0
    model = made[0]
    assert [shape for shape, _ in model.calls] == [(3, 1), (3, 1), (3, 5), (3, 5), (3, 5)]
    assert [taken for shape, taken in model.calls if shape == (3, 5)] == [0, 0, 0]
    assert graphs[0].replays == given.new
    assert [(cache.batch, cache.size) for cache in seen] == [(3, 9)] * 2
    assert len(torch.unique(model.named["block.0.mlp.mlp1_weight"])) > 200
    assert (model.named["block.0.attn.norm.scale"] == 1).all()
    assert model.named["block.0.attn.sinks"].isfinite().all()
    assert all(118 <= int(x) < 122 for mx in model.scales for x in mx.storage.data.flatten())


def test_openais_implementation_says_what_is_missing(tmp_path):
    file = tmp_path / "config.json"
    file.write_text(json.dumps(GptOssConfig.preset("gpt-oss-20b").to_hf()))
    command = [
        sys.executable,
        "-m",
        "gptoss_jax.bench.peer_triton",
        "--config",
        str(file),
        "--threads",
        "1",
    ]
    with pytest.raises(GptOssError, match=r"missing: .*(gpt-oss\[triton\]|a GPU)"):
        suite._child(command, 60)
