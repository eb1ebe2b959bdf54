"""Adapters against peft on transformers' model: gradients by torch's autograd, logits of what we
export, what peft saves read by us, merged checkpoints read by transformers.

Needs the extra `parity`; run with `pytest tests/parity`.
"""

import dataclasses

import numpy as np
import pytest

pytest.importorskip("torch", reason="the references need torch: pip install -e '.[parity]'")
pytest.importorskip(
    "transformers", reason="a reference is transformers: pip install -e '.[parity]'"
)
pytest.importorskip("peft", reason="a reference is peft: pip install -e '.[parity]'")

import jax
import jax.numpy as jnp
import peft
import random_checkpoints
import references
import torch
from gptoss_jax.convert import merge
from gptoss_jax.convert.export import write
from safetensors.numpy import load_file, save_file

from gptoss_jax import adapters, lora
from gptoss_jax import model as network
from gptoss_jax.adapters import peft as form
from gptoss_jax.checkpoint import load_params, stored_tree
from gptoss_jax.lora import LoraConfig
from gptoss_jax.mxfp4 import MxTensor

pytestmark = pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"
)
BOTH = LoraConfig(rank=3, alpha=6.0)
CASES = (
    random_checkpoints.CASES[0],
    # as in the released models, only values tell inputs from outputs of down_proj
    random_checkpoints.Case("square", seed=11, layers=3, intermediate=64, limit=3.0),
)


@dataclasses.dataclass
class Place:
    """A checkpoint in two layouts, and distinct tokens, so that dx is the embedding's gradient."""

    case: random_checkpoints.Case
    folder: object
    tokens: np.ndarray
    config: object
    params: dict

    def drawn(self, settings, seed=0):
        generator = np.random.default_rng(seed)
        return jax.tree.map(
            lambda leaf: (0.1 * generator.normal(size=leaf.shape)).astype(np.float32),
            lora.shapes(self.config, settings),
        )

    def ours(self, tree, settings):
        added = lora.additions(tree, settings)
        return network.forward(
            self.params, jnp.asarray(self.tokens), config=self.config, added=added
        )[0]

    def base(self):
        return references.transformers_model(self.folder / "bf16")

    def theirs(self, folder, **options):
        return peft.PeftModel.from_pretrained(self.base(), folder, **options)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def place(request, tmp_path_factory):
    case = request.param
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(case.name)
    for layout in ("mxfp4", "bf16"):
        random_checkpoints.write(folder / layout, case, layout)
    config, params = load_params(folder / "mxfp4", dtype="float32")
    count = case.batch * case.tokens
    assert count <= case.vocab
    tokens = np.random.default_rng(case.seed).permutation(case.vocab)[:count].astype(np.int32)
    return Place(case, folder, tokens.reshape(case.batch, case.tokens), config, params)


def export(folder, tree, settings, config):
    return form.export(folder, adapters.Adapter(tree, settings), config)


@pytest.mark.parametrize(
    "settings",
    [
        BOTH,
        LoraConfig(rank=3, alpha=5.0, expert_rank=2, rslora=True, targets=("all",)),
        LoraConfig(rank=2, alpha=4.0, targets=("down",)),
        LoraConfig(rank=2, alpha=4.0, targets=("gate_up", "o"), layers=(1,)),
    ],
    ids=["attention and experts", "all", "down", "one layer"],
)
def test_peft_computes_our_logits_from_what_we_export(place, tmp_path, settings):
    tree = place.drawn(settings)
    export(tmp_path / "peft", tree, settings, place.config)
    theirs = references.transformers_logits(place.theirs(tmp_path / "peft"), place.tokens)
    apart = references.distance(np.asarray(place.ours(tree, settings)), theirs)
    plain = references.transformers_logits(place.base(), place.tokens)
    print(f"PARITY adapter in peft {peft.__version__}: {apart:.1e}")
    assert references.distance(theirs, plain) > 0.1
    assert apart < 1e-4


def test_a_permuted_b_is_noticed(place, tmp_path):
    """Expert-major B has the same shape: only values tell."""
    tree = place.drawn(BOTH)
    export(tmp_path / "peft", tree, BOTH, place.config)
    tensors, E = load_file(tmp_path / "peft" / form.TENSORS), place.config.num_experts
    for key, value in tensors.items():
        if ".experts." in key and "lora_B" in key:
            by_rank = value.reshape(len(value), -1, E)
            tensors[key] = np.ascontiguousarray(by_rank.transpose(0, 2, 1)).reshape(value.shape)
    save_file(tensors, tmp_path / "peft" / form.TENSORS)
    theirs = references.transformers_logits(place.theirs(tmp_path / "peft"), place.tokens)
    assert references.distance(np.asarray(place.ours(tree, BOTH)), theirs) > 1e-2


def test_gradients_are_those_of_torch(place, tmp_path):
    """Of every a and b, and of the inputs, through packed experts."""
    settings = LoraConfig(rank=3, alpha=6.0, targets=("attention", "experts", "unembedding"))
    tree = place.drawn(settings)
    export(tmp_path / "peft", tree, settings, place.config)
    theirs = place.theirs(tmp_path / "peft", is_trainable=True)
    embedding = theirs.get_base_model().get_input_embeddings().weight.requires_grad_()
    weights = np.random.default_rng(5).normal(size=(*place.tokens.shape, place.case.vocab))
    out = theirs(input_ids=torch.as_tensor(place.tokens, dtype=torch.long), use_cache=False)
    loss = (out.logits * torch.as_tensor(weights, dtype=torch.float32)).mean()
    loss.backward()
    named = {
        name.replace(".default", ""): parameter.grad.numpy()
        for name, parameter in theirs.named_parameters()
        if "lora_" in name
    }

    def ours(tree, embedding):
        params = {**place.params, "embedding": embedding}
        logits, _ = network.apply(
            params,
            jnp.asarray(place.tokens),
            config=place.config,
            added=lora.additions(tree, settings),
        )
        return (logits * jnp.asarray(weights, jnp.float32)).mean()

    value, (found, dx) = jax.jit(jax.value_and_grad(ours, argnums=(0, 1)))(
        tree, place.params["embedding"]
    )
    np.testing.assert_allclose(float(value), float(loss), rtol=1e-4, atol=1e-6)
    worst = compare("dx", np.asarray(dx), embedding.grad.numpy())
    modules = form.modules(place.config)
    for path, pair in lora.pairs_of(found):
        module = modules[path]
        if path[-1] in lora.EXPERTS:
            inner = ".base_layer" if path[-1] == "gate_up" else ""
            module = module.rpartition(".")[0] + inner
        stem = f"{form.PREFIX}{module}.lora_"
        gradients = (named.pop(f"{stem}{part}.weight") for part in "AB")
        wanted = form.from_peft(path[-1], *gradients, place.config)
        for part, want in zip("ab", wanted, strict=True):
            worst = max(worst, compare(f"{path} {part}", np.asarray(pair[part]), want))
    assert not named
    print(f"PARITY gradients from torch's: {worst:.1e}")


def compare(name, ours, theirs) -> float:
    assert ours.shape == theirs.shape, name
    scale = np.abs(theirs).max()
    assert scale > 0, name
    apart = float(np.abs(ours - theirs).max() / scale)
    assert apart < 2e-4, name
    return apart


def test_the_clamp_is_active_and_sinks_matter(place):
    """Otherwise the gradients would not show much."""
    calls = []

    def counting(module, inputs, output):
        h = inputs[0].detach()
        for e in range(module.num_experts):
            gate_up = h @ module.gate_up_proj[e] + module.gate_up_proj_bias[e]
            gate, up = gate_up[..., ::2], gate_up[..., 1::2]
            calls.append(float(((gate > module.limit) | (up.abs() > module.limit)).float().mean()))

    base = place.base()
    for layer in base.model.layers:
        layer.mlp.experts.register_forward_hook(counting)
        assert layer.self_attn.sinks.abs().min() > 0
    references.transformers_logits(base, place.tokens)
    assert np.mean(calls) > 0.01
    assert place.case.tokens > 2 * place.case.window


@pytest.mark.parametrize(
    "settings",
    [
        {
            "target_modules": ["q_proj", "o_proj"],
            "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        },
        {"target_modules": [], "target_parameters": ["1.mlp.experts.down_proj"]},
        {
            "target_modules": ["k_proj", "v_proj", "lm_head"],
            "use_rslora": True,
            "rank_pattern": {"v_proj": 4},
            "alpha_pattern": {"layers.0.self_attn.k_proj": 3},
        },
        {"target_modules": "all-linear"},
    ],
    ids=["both", "down", "patterns", "all-linear"],
)
def test_what_peft_saves_is_read(place, tmp_path, settings):
    config = peft.LoraConfig(r=3, lora_alpha=7, task_type="CAUSAL_LM", **settings)
    theirs = peft.get_peft_model(place.base(), config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(0, 0.1, generator=generator)
    theirs.save_pretrained(tmp_path / "peft")
    found = adapters.load(tmp_path / "peft", place.config)
    ours = np.asarray(place.ours(found.tree, found.lora))
    want = references.transformers_logits(theirs.eval(), place.tokens)
    plain = references.transformers_logits(place.base(), place.tokens)
    assert references.distance(want, plain) > 0.05
    assert references.distance(ours, want) < 1e-4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "mxfp4"])
def test_transformers_reads_what_was_merged(place, tmp_path, dtype):
    """From a float32 base merging keeps float32: then the logits are those of the adapter, too."""
    tree, base = place.drawn(BOTH), place.folder / "mxfp4"
    if dtype == "float32":
        base = tmp_path / "base"
        base.mkdir()

        def is_mx(x):
            return isinstance(x, MxTensor)

        dense = jax.tree.map(
            lambda x: x.dequantize(jnp.float32) if is_mx(x) else x, place.params, is_leaf=is_mx
        )
        write(base, place.config, stored_tree(dense))
    adapters.save(tmp_path / "adapter", tree, BOTH, place.config)
    options = {"dtype": "mxfp4", "requantize": True} if dtype == "mxfp4" else {}
    merge(base, tmp_path / "merged", tmp_path / "adapter", **options)
    theirs = references.transformers_logits(
        references.transformers_model(tmp_path / "merged"), place.tokens
    )
    config, params = load_params(tmp_path / "merged", dtype="float32")
    ours = network.forward(params, jnp.asarray(place.tokens), config=config)[0]
    assert references.distance(np.asarray(ours), theirs) < 1e-4
    if dtype == "float32":
        apart = references.distance(np.asarray(place.ours(tree, BOTH)), theirs)
        print(f"PARITY merged: {apart:.1e} from the adapter")
        assert apart < 1e-4
