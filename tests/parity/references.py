"""The two reference implementations, run in float32 on the CPU: transformers (eager) and OpenAI's
torch model.

OpenAI's model is taken from the published `gpt-oss` wheel as it is. What is adapted, each from
outside:

* The wheel wants Python 3.12 for its tools; gpt_oss/torch is plain Python. It is downloaded as a
  file and unpacked.
* Parameters are declared in bfloat16. The checkpoint is read by its own reader in bfloat16 (exact:
  all tensors are
  bfloat16 or MXFP4), then `Module.float()` makes all parameters float32. Every other dtype in
  model.py follows its input (mask: Q.new_full; cos and sin: .to(x.dtype); RMSNorm: back to x's
  dtype), so the whole computation is float32.
* It takes one sequence without a batch axis: sequences are run one by one.
* It keeps all positions of all layers, with no cache: "decode" of position t is row t of a full
  forward.
* `mlp1_weight[expert_indices]` copies four experts for each token: for full-width models `chunk`
  bounds the tokens that an
  MLP sees at once (tokens are independent there).
"""

import hashlib
import itertools
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch

VERSION = "0.0.9"
SHA256 = "4bbd174a6af2060179ab292505ec8e0f2505188628a6d102bd72690d06387f9c"
VARIABLE = "GPTOSS_REFERENCE"


def cache_folder() -> Path:
    """Where the unpacked wheel is kept: $GPTOSS_REFERENCE, else the user's cache."""
    if os.environ.get(VARIABLE):
        return Path(os.environ[VARIABLE])
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "gptoss_jax" / f"gpt_oss-{VERSION}"


def fetch(folder: Path | None = None) -> Path:
    """Downloads and unpacks OpenAI's reference once.

    Args:
      folder: Where to; by default `cache_folder()`.

    Returns:
      A folder to put on sys.path, with gpt_oss/torch/model.py in it.

    Raises:
      OSError: It is not there and cannot be downloaded; the message holds pip's last line.
    """
    folder = Path(folder or cache_folder())
    if (folder / "gpt_oss" / "torch" / "model.py").is_file():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        _download(Path(work))
        try:
            os.replace(Path(work, "unpacked"), folder)
        except OSError:  # another run was first
            if not (folder / "gpt_oss").is_dir():
                raise
    return folder


def _download(work: Path) -> None:
    """Puts the torch reference into work/unpacked."""
    # Tags of the wheel, not of this interpreter: nothing of it is installed or compiled.
    options = ["--no-deps", "--python-version", "3.12", "--only-binary=:all:", "--dest", str(work)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *options, f"gpt-oss=={VERSION}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise OSError(
            f"gpt-oss=={VERSION} cannot be downloaded ({last}): "
            f"set {VARIABLE} to a folder that holds gpt_oss/"
        )
    wheel = work / f"gpt_oss-{VERSION}-py3-none-any.whl"
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise OSError(f"{wheel.name} has sha256 {digest}, expected {SHA256}: another file was sent")
    with zipfile.ZipFile(wheel) as archive:
        wanted = ("gpt_oss/torch/", "gpt_oss/__init__")
        members = [name for name in archive.namelist() if name.startswith(wanted)]
        archive.extractall(work / "unpacked", members)


def openai_module():
    """The module gpt_oss.torch.model of the unpacked wheel.

    Raises:
      OSError: It cannot be had.
    """
    folder = str(fetch())
    if folder not in sys.path:
        sys.path.append(folder)
    from gpt_oss.torch import model

    return model


def openai_model(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """OpenAI's torch model of a checkpoint in the original layout, in evaluation mode."""
    model = openai_module().Transformer.from_checkpoint(str(folder), device="cpu")
    return model.to(dtype).eval()


@torch.inference_mode()
def openai_logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Logits of OpenAI's model, float32 [B, T, V], for int [B, T]."""
    return np.stack(
        [model(torch.as_tensor(row, dtype=torch.long)).float().numpy() for row in tokens]
    )


@torch.inference_mode()
def openai_early_exits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Logits as if the model ended after 0, 1, ... layers, float32 [layers + 1, B, T, V]."""
    exits = []
    for row in tokens:
        x = model.embedding(torch.as_tensor(row, dtype=torch.long))
        states = [x]
        for block in model.block:
            states.append(block(states[-1]))
        exits.append(torch.stack([model.unembedding(model.norm(x)) for x in states]).numpy())
    return np.stack(exits, axis=1)


def clamped(model: torch.nn.Module, tokens: np.ndarray) -> tuple[int, int]:
    """How many of the experts' inputs to SwiGLU the clamp changes in a forward, and of how many."""
    module = openai_module()
    counts = [0, 0]
    swiglu = module.swiglu

    def counting(x, alpha=1.702, limit=7.0):
        gate, up = x[..., ::2], x[..., 1::2]
        counts[0] += int((gate > limit).sum() + (up.abs() > limit).sum())
        counts[1] += x.numel()
        return swiglu(x, alpha=alpha, limit=limit)

    module.swiglu = counting
    try:
        openai_logits(model, tokens)
    finally:
        module.swiglu = swiglu
    return counts[0], counts[1]


def transformers_model(folder: Path, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """transformers' model of a checkpoint in a Hugging Face layout, with eager attention and eager
    experts.

    MXFP4 is dequantised by transformers' own code, to bfloat16 (exact), before the cast to `dtype`.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    options = {}
    if "quantization_config" in json.loads((Path(folder) / "config.json").read_text()):
        options["quantization_config"] = transformers.Mxfp4Config(dequantize=True)
    model = transformers.GptOssForCausalLM.from_pretrained(
        folder,
        dtype=torch.bfloat16 if options else dtype,
        attn_implementation="eager",
        experts_implementation="eager",
        local_files_only=True,
        **options,
    )
    return model.to(dtype).eval()


@torch.inference_mode()
def transformers_logits(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Logits of transformers' model, float32 [B, T, V], for int [B, T]."""
    return (
        model(input_ids=torch.as_tensor(tokens, dtype=torch.long), use_cache=False)
        .logits.float()
        .numpy()
    )


@torch.inference_mode()
def transformers_decode(model: torch.nn.Module, tokens: np.ndarray) -> np.ndarray:
    """Logits of transformers' model fed one token at a time through its own cache, float32 [B, T,
    V]."""
    past, steps = None, []
    for t in range(tokens.shape[1]):
        ids = torch.as_tensor(tokens[:, t : t + 1], dtype=torch.long)
        found = model(input_ids=ids, past_key_values=past, use_cache=True)
        past = found.past_key_values
        steps.append(found.logits.float().numpy())
    return np.concatenate(steps, axis=1)


@torch.inference_mode()
def streamed_logits(case, parameters, tokens: np.ndarray, chunk: int = 4) -> list[np.ndarray]:
    """Logits of both references for a model of full width, holding one layer at a time (3.3 GB).

    Args:
      case: A random_checkpoints.Case.
      parameters: Its tensors in order, as (original name, array) pairs.
      tokens: int [1, T].
      chunk: Tokens that OpenAI's MLP sees at once.

    Returns:
      float32 [1, T, V] of OpenAI's model, of transformers', and of transformers' decoding.
    """
    import random_checkpoints
    import transformers
    from transformers.models.gpt_oss import modeling_gpt_oss as hf

    module, raw = openai_module(), random_checkpoints.hf_config(case)
    openai_config = module.ModelConfig(**random_checkpoints.original_config(case))
    stream = iter(parameters)
    x_openai = _tensor(next(stream)[1][tokens[0]])
    x_full = x_steps = x_openai[None]
    for i in range(case.layers):
        state = _block(case, stream)
        with torch.device("meta"):
            block = module.TransformerBlock(openai_config, i)
        block.load_state_dict(state, assign=True)
        x_openai = torch.cat([block.mlp(part) for part in block.attn(x_openai).split(chunk)])
        # The cache and the masks of transformers ask for a whole model: here it is one of this
        # layer.
        alone = raw | {"num_hidden_layers": 1, "layer_types": raw["layer_types"][i : i + 1]}
        config = transformers.GptOssConfig(**alone)
        config._attn_implementation = config._experts_implementation = "eager"
        with torch.device("meta"):
            layer = hf.GptOssDecoderLayer(config, 0)
        layer.load_state_dict(_renamed(case, state), assign=True)
        x_full = _transformers_layer(layer, config, x_full, None, 0)
        past = transformers.DynamicCache(config=config)
        steps = [
            _transformers_layer(layer, config, x, past, t)
            for t, x in enumerate(x_steps.split(1, dim=1))
        ]
        x_steps = torch.cat(steps, dim=1)
        del block, layer, state, past, steps
    with torch.device("meta"):
        norms = module.RMSNorm(case.hidden), hf.GptOssRMSNorm(case.hidden, eps=raw["rms_norm_eps"])
    scale = _tensor(next(stream)[1])
    norms[0].load_state_dict({"scale": scale}, assign=True)
    norms[1].load_state_dict({"weight": scale}, assign=True)
    states = norms[0](x_openai)[None], norms[1](x_full), norms[1](x_steps)
    parts = []
    # Both unembeddings are linear layers without a bias: a part of the vocabulary at a time.
    for rows in np.array_split(next(stream)[1], 8):
        weight = _tensor(rows)
        parts.append([torch.nn.functional.linear(x, weight).numpy() for x in states])
    return [np.concatenate(found, axis=-1) for found in zip(*parts, strict=True)]


def _transformers_layer(layer, config, x, past, position):
    """One layer on the states from `position` on, after what `past` holds."""
    from transformers import masking_utils
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

    sliding = config.layer_types[0] == "sliding_attention"
    make = "create_sliding_window_causal_mask" if sliding else "create_causal_mask"
    mask = getattr(masking_utils, make)(
        config=config, inputs_embeds=x, attention_mask=None, past_key_values=past
    )
    positions = torch.arange(position, position + x.shape[1])[None]
    rotation = GptOssRotaryEmbedding(config)(x, positions)
    return layer(x, attention_mask=mask, past_key_values=past, position_embeddings=rotation)


def _tensor(array: np.ndarray) -> torch.Tensor:
    """float32 of a bfloat16 array, which torch does not take from numpy."""
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16).float()


def _block(case, stream) -> dict[str, torch.Tensor]:
    """The next layer's state for OpenAI's TransformerBlock, in float32."""
    import random_checkpoints

    state, blocks = {}, None
    while len(state) < 13:
        name, array = next(stream)
        name = name.split(".", 2)[2]
        if name.endswith(".blocks"):
            blocks = array
        elif name.endswith(".scales"):
            dense = random_checkpoints.dequantize(blocks, array)
            state[name.removesuffix(".scales")] = torch.from_numpy(dense)
            blocks = None
        else:
            state[name] = _tensor(array)
    return state


def _renamed(case, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """OpenAI's state of a layer as transformers' GptOssDecoderLayer has it; experts are views."""
    q, k = case.heads * case.head_dim, case.kv_heads * case.head_dim
    found = {
        f"self_attn.{letter}_proj.{kind}": state[f"attn.qkv.{kind}"][first:last]
        for letter, first, last in (("q", 0, q), ("k", q, q + k), ("v", q + k, q + 2 * k))
        for kind in ("weight", "bias")
    }
    return found | {
        "input_layernorm.weight": state["attn.norm.scale"],
        "post_attention_layernorm.weight": state["mlp.norm.scale"],
        "self_attn.o_proj.weight": state["attn.out.weight"],
        "self_attn.o_proj.bias": state["attn.out.bias"],
        "self_attn.sinks": state["attn.sinks"],
        "mlp.router.weight": state["mlp.gate.weight"],
        "mlp.router.bias": state["mlp.gate.bias"],
        "mlp.experts.gate_up_proj": state["mlp.mlp1_weight"].transpose(1, 2),
        "mlp.experts.gate_up_proj_bias": state["mlp.mlp1_bias"],
        "mlp.experts.down_proj": state["mlp.mlp2_weight"].transpose(1, 2),
        "mlp.experts.down_proj_bias": state["mlp.mlp2_bias"],
    }


def distance(logits: np.ndarray, reference: np.ndarray) -> float:
    """Largest difference in units of the reference logits' standard deviation."""
    assert logits.shape == reference.shape, (logits.shape, reference.shape)
    return float(np.abs(logits.astype(np.float64) - reference).max() / reference.std())


def bound(*references: np.ndarray) -> tuple[float, float]:
    """How far the references are apart, and how far we may be: 3 times that, never above 5e-4.

    Of transformers both a full forward and its own decoding are to be given. The full forwards of
    the two references run the same torch kernels on the same shapes, so that most of their rounding
    errors are equal and cancel: at full width they are 2e-5 apart, and 7e-5 from a forward in
    float64. Transformers' full forward and decoding are 7e-5 apart there.
    """
    pairs = itertools.combinations(references, 2)
    apart = max(distance(a, b) for a, b in pairs)
    return apart, min(3 * apart, 5e-4)
