"""Makes the golden logits: what both references say about the random cases, so that plain tests
need no torch.

Run with the extra `parity` from the repository's root: `python tests/golden/make_golden.py`.
Weights and tokens are not stored: random_checkpoints makes the same bits everywhere.
"""

import dataclasses
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS / "parity")]

import random_checkpoints  # noqa: E402
import references  # noqa: E402


def logits(case: random_checkpoints.Case) -> dict[str, np.ndarray]:
    """Arrays of one golden file.

    Args:
      case: The random model.

    Returns:
      case: Its fields as JSON.
      exits: OpenAI's float32 logits if the model ended after 0, 1, ... layers [layers + 1, B, T,
      V].
      transformers: transformers' float32 logits [B, T, V].
      allowed: How far from either a float32 implementation may be, in standard deviations.
    """
    with tempfile.TemporaryDirectory() as folder:
        original = random_checkpoints.write(Path(folder) / "original", case, "original")
        bf16 = random_checkpoints.write(Path(folder) / "bf16", case, "bf16")
        tokens = random_checkpoints.prompts(case)
        exits = references.openai_early_exits(references.openai_model(original), tokens)
        model = references.transformers_model(bf16)
        full = references.transformers_logits(model, tokens)
        decoded = references.transformers_decode(model, tokens)
    return {
        "case": np.array(json.dumps(dataclasses.asdict(case))),
        "exits": exits,
        "transformers": full,
        "allowed": np.array(references.bound(exits[-1], full, decoded)[1]),
    }


def rope() -> dict[str, np.ndarray]:
    """OpenAI's and transformers' rotary frequencies, and OpenAI's cos and sin, for every case and
    the released one.

    Returns:
      For each name: <name>/settings as JSON, <name>/openai and <name>/transformers float32 [H / 2],
      <name>/concentration; and released/cos, released/sin at released/positions, float32.
    """
    import torch
    import transformers
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRotaryEmbedding

    module, found = references.openai_module(), {}
    for case in (
        *random_checkpoints.CASES,
        dataclasses.replace(random_checkpoints.FULL_WIDTH, name="released"),
    ):
        embedding = module.RotaryEmbedding(
            case.head_dim,
            case.theta,
            torch.float32,
            initial_context_length=case.original_context,
            scaling_factor=case.factor,
            ntk_alpha=1.0,
            ntk_beta=case.beta_fast,
        )
        concentration, inverse = embedding._compute_concentration_and_inv_freq()
        config = transformers.GptOssConfig(**random_checkpoints.hf_config(case))
        theirs = GptOssRotaryEmbedding(config)
        assert theirs.attention_scaling == concentration
        settings = {
            "head_dim": case.head_dim,
            "theta": float(case.theta),
            "factor": case.factor,
            "beta_fast": case.beta_fast,
            "beta_slow": 1.0,
            "original_context": case.original_context,
        }
        found |= {
            f"{case.name}/settings": np.array(json.dumps(settings)),
            f"{case.name}/openai": inverse.numpy(),
            f"{case.name}/transformers": theirs.inv_freq.numpy(),
            f"{case.name}/concentration": np.array(concentration),
        }
    positions = np.array([0, 1, 100, 4095, 4096, 65537, 131071])
    cos, sin = embedding._compute_cos_sin(131072)
    found |= {
        "released/positions": positions,
        "released/cos": cos.numpy()[positions],
        "released/sin": sin.numpy()[positions],
    }
    return found


if __name__ == "__main__":
    for name, make in [
        (case.name, lambda case=case: logits(case)) for case in random_checkpoints.CASES
    ] + [("rope", rope)]:
        path = Path(__file__).with_name(f"{name}.npz")
        np.savez_compressed(path, **make())
        print(f"{path.name}: {path.stat().st_size} bytes")
