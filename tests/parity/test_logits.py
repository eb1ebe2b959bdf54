"""Our logits against live transformers and OpenAI's torch reference, from all three layouts.

Needs the extra `parity`; run with `pytest tests/parity`. With GPTOSS_PARITY=required a reference
that cannot be had is a failure and not a skip.
"""

import dataclasses
import os

import numpy as np
import pytest

pytest.importorskip("torch", reason="the references need torch: pip install -e '.[parity]'")
pytest.importorskip(
    "transformers", reason="a reference is transformers: pip install -e '.[parity]'"
)

import jax.numpy as jnp
import random_checkpoints
import references
import torch

from gptoss_jax.cache import make_cache
from gptoss_jax.checkpoint import load_params
from gptoss_jax.model import forward

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def check(what: str, ours, *theirs: np.ndarray) -> None:
    """Ours is no further from OpenAI's and transformers' logits than the references allow."""
    apart, allowed = references.bound(*theirs)
    openai, transformers = (references.distance(ours, reference) for reference in theirs[:2])
    print(
        f"PARITY {what}: references apart {apart:.1e}; ours from openai {openai:.1e}, "
        f"from transformers {transformers:.1e}; allowed {allowed:.1e}"
    )
    assert max(openai, transformers) <= allowed


@dataclasses.dataclass
class Measured:
    """A case, its three checkpoints and what the references say about it."""

    case: random_checkpoints.Case
    folder: object
    tokens: np.ndarray
    openai: np.ndarray
    transformers: np.ndarray
    decoded: np.ndarray

    def check(self, ours, what: str) -> None:
        """Ours is close enough to both references."""
        check(f"{self.case.name}, {what}", ours, self.openai, self.transformers, self.decoded)


@pytest.fixture(scope="session", autouse=True)
def openai():
    try:
        return references.openai_module()
    except OSError as error:
        if os.environ.get("GPTOSS_PARITY") == "required":
            raise
        pytest.skip(str(error))


@pytest.fixture(scope="module", params=random_checkpoints.CASES, ids=lambda case: case.name)
def measured(request, tmp_path_factory):
    case = request.param
    folder = tmp_path_factory.mktemp(case.name)
    for layout in random_checkpoints.LAYOUTS:
        random_checkpoints.write(folder / layout, case, layout)
    tokens = random_checkpoints.prompts(case)
    model = references.transformers_model(folder / "bf16")
    return Measured(
        case,
        folder,
        tokens,
        references.openai_logits(references.openai_model(folder / "original"), tokens),
        references.transformers_logits(model, tokens),
        references.transformers_decode(model, tokens),
    )


def ours(params, config, tokens, widths) -> np.ndarray:
    """Our logits with the tokens fed in calls of the given widths."""
    cache = make_cache(config, len(tokens), tokens.shape[1], jnp.float32)
    found, start = [], 0
    for width in widths:
        logits, cache = forward(
            params, jnp.asarray(tokens[:, start : start + width]), cache, config=config
        )
        found.append(logits)
        start += width
    assert start == tokens.shape[1]
    return np.concatenate(found, axis=1)


def test_the_cases_are_hard_enough(measured):
    case = measured.case
    changed, total = references.clamped(
        references.openai_model(measured.folder / "original"), measured.tokens
    )
    assert 0.01 < changed / total < 0.3
    assert case.tokens > 2 * case.window
    groups = case.heads // case.kv_heads
    assert case.hidden != case.intermediate
    assert case.heads != case.head_dim
    assert case.kv_heads != groups
    assert references.bound(measured.openai, measured.transformers, measured.decoded)[0] < 5e-5


def test_transformers_reads_our_mxfp4_files_as_the_unpacked_ones(measured):
    found = references.transformers_logits(
        references.transformers_model(measured.folder / "mxfp4"), measured.tokens
    )
    np.testing.assert_array_equal(found, measured.transformers)


@pytest.mark.parametrize("layout", random_checkpoints.LAYOUTS)
def test_float32_logits(measured, layout):
    case, tokens = measured.case, measured.tokens
    config, params = load_params(measured.folder / layout, dtype="float32")
    logits, none = forward(params, jnp.asarray(tokens), config=config)
    assert none is None
    assert logits.dtype == jnp.float32
    measured.check(np.asarray(logits), f"{layout}, prefill")
    measured.check(ours(params, config, tokens, [1] * case.tokens), f"{layout}, decode")
    chunk = case.window + 2  # no multiple of the window, so that rings wrap inside a chunk
    whole, rest = divmod(case.tokens, chunk)
    measured.check(
        ours(params, config, tokens, [chunk] * whole + [rest] * bool(rest)),
        f"{layout}, chunked prefill",
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded_rows_give_the_logits_of_each_prompt_alone(measured, side):
    case = measured.case
    config, params = load_params(measured.folder / "mxfp4", dtype="float32")
    lengths = [case.window + 3, 2, case.tokens - 4]
    width, steps = max(lengths), 3
    rows = np.resize(measured.tokens, (len(lengths), case.tokens))
    rows[:, 0] = np.arange(len(lengths))  # different prompts, whatever the batch of the case
    batch = np.full((len(lengths), width), config.pad_token_id, np.int32)
    mask = np.zeros(batch.shape, bool)
    for row, length in enumerate(lengths):
        part = slice(width - length, width) if side == "left" else slice(0, length)
        batch[row, part], mask[row, part] = rows[row, :length], True
    cache = make_cache(config, len(lengths), width + steps, jnp.float32)
    prefill, cache = forward(
        params, jnp.asarray(batch), cache, config=config, mask=jnp.asarray(mask)
    )
    after = []
    for step in range(steps):
        following = np.stack([rows[row, [length + step]] for row, length in enumerate(lengths)])
        logits, cache = forward(params, jnp.asarray(following), cache, config=config)
        after.append(np.asarray(logits))
    after = np.concatenate(after, axis=1)
    allowed = references.bound(measured.openai, measured.transformers, measured.decoded)[1]
    model = references.transformers_model(measured.folder / "bf16")
    for row, length in enumerate(lengths):
        found = np.concatenate([np.asarray(prefill[row])[mask[row]], after[row]])
        alone = references.transformers_logits(model, rows[row : row + 1, : length + steps])[0]
        assert references.distance(found, alone) <= allowed


def test_bfloat16_chooses_the_same_token(tmp_path):
    """Over all cases, where the reference's margin exceeds its own bfloat16 error, we choose its
    token in 99 of 100."""
    right = counted = 0
    for case in random_checkpoints.CASES:
        case = dataclasses.replace(case, batch=8, tokens=64)
        tokens = random_checkpoints.prompts(case)
        folder = random_checkpoints.write(tmp_path / case.name, case, "bf16")
        exact = references.transformers_logits(references.transformers_model(folder), tokens)
        coarse = references.transformers_logits(
            references.transformers_model(folder, torch.bfloat16), tokens
        )
        config, params = load_params(folder, dtype="bfloat16")
        found = np.asarray(forward(params, jnp.asarray(tokens), config=config)[0])
        top = np.sort(exact, axis=-1)
        error = np.abs(coarse - exact).max(-1)
        clear = top[..., -1] - top[..., -2] > error
        right += (found.argmax(-1) == exact.argmax(-1))[clear].sum()
        counted += clear.sum()
        assert np.abs(found - exact).mean() <= 1.1 * np.abs(coarse - exact).mean(), case.name
    print(f"PARITY bfloat16: same first token in {right} of {counted} positions")
    assert counted > 2000
    assert right / counted >= 0.99
