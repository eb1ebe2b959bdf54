"""Packing against brute force and the network; the order of batches, processes, and going on from
any batch."""

import hashlib
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax import forward
from gptoss_jax.errors import GptOssError
from gptoss_jax.train.packing import best_fit, default_buckets, fill, into_buckets
from gptoss_jax.train.pipeline import Batches, BatchSettings
from gptoss_jax.train.samples import DataReport, Sample, Samples

NAMES = ("tokens", "segments", "weights")


def made(lengths, vocabulary=5000, seed=0):
    """Samples of given lengths; every token of all of them is another one, as far as ids reach."""
    rng = np.random.default_rng(seed)
    ids = np.arange(sum(lengths)) % vocabulary
    out, at = [], 0
    for number, length in enumerate(lengths):
        weights = rng.integers(0, 3, length).astype(np.float32)
        weights[0], weights[-1] = 0, 1
        out.append(Sample(ids[at : at + length].astype(np.int32), weights, f"row {number}"))
        at += length
    return Samples(out, DataReport(len(out), 0, len(out), 0, max(lengths), 0, 0, at, at))


def lengths(count=40, longest=60, seed=1):
    return np.random.default_rng(seed).integers(2, longest + 1, count).tolist()


def batches(data, **keys):
    return Batches(data, tiny.tokenizer(), BatchSettings(**{"length": 64, "batch": 4, **keys}))


def unpacked(batch):
    """(tokens, weights) of every segment, in order."""
    for tokens, segments, weights in zip(*(batch[name] for name in NAMES), strict=True):
        for segment in range(1, segments.max(initial=0) + 1):
            inside = segments == segment
            yield tuple(tokens[inside].tolist()), tuple(weights[inside].tolist())


def whole(data):
    return sorted((tuple(s.tokens.tolist()), tuple(s.weights.tolist())) for s in data.samples)


def same(one, other):
    return all(
        one[name].dtype == other[name].dtype and np.array_equal(one[name], other[name])
        for name in NAMES
    )


# packing


@given(st.lists(st.integers(1, 32), min_size=1, max_size=60))
@settings(max_examples=200, deadline=None)
def test_rows_hold_every_sample_once(sizes):
    rows = best_fit(sizes, 32)
    assert sorted(itertools.chain(*rows)) == list(range(len(sizes)))
    filled = [sum(sizes[i] for i in row) for row in rows]
    assert max(filled) <= 32
    assert rows == best_fit(list(sizes), 32)
    # no two rows would fit into one, or some sample was not put where it fits
    assert len(rows) == 1 or sum(sorted(filled)[:2]) > 32
    assert len(rows) >= math.ceil(sum(filled) / 32)


@given(st.lists(st.integers(2, 12), min_size=1, max_size=7))
@settings(max_examples=60, deadline=None)
def test_rows_are_hardly_more_than_the_fewest(sizes):
    def fits(count):
        """Brute force: can the samples be put into so many rows?"""

        def put(number, rooms):
            return number == len(sizes) or any(
                put(number + 1, (*rooms[:i], room - sizes[number], *rooms[i + 1 :]))
                for i, room in enumerate(rooms)
                if room >= sizes[number] and room not in rooms[:i]
            )

        return put(0, (12,) * count)

    fewest = next(n for n in range(1, len(sizes) + 1) if fits(n))
    assert len(best_fit(sizes, 12)) <= 11 * fewest / 9 + 6 / 9


def test_the_best_row_is_the_fullest_that_fits():
    # 9 and 7 begin rows with 3 and 5 left; 3 goes where nothing remains, then 5 fills the other
    assert best_fit([5, 3, 9, 7], 12) == [(2, 1), (3, 0)]


@given(st.lists(st.integers(2, 40), min_size=1, max_size=30), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_no_token_is_lost_and_no_segment_is_split(sizes, seed):
    data = made(sizes, seed=seed)
    rows = best_fit(sizes, 40)
    batch = fill(data.samples, rows, 40, padding=4999)
    assert [batch[name].dtype for name in NAMES] == [np.int32, np.int32, np.float32]
    assert {batch[name].shape for name in NAMES} == {(len(rows), 40)}
    assert sorted(unpacked(batch)) == whole(data)
    for tokens, segments, weights in zip(*(batch[name] for name in NAMES), strict=True):
        starts = np.flatnonzero(np.diff(segments, prepend=0) > 0)
        assert (weights[starts] == 0).all()
        assert (weights[segments == 0] == 0).all()
        assert (tokens[segments == 0] == 4999).all()
        used = segments[segments > 0]
        assert (np.diff(used) >= 0).all()  # one after another, each in one piece
        assert (segments[: len(used)] > 0).all()  # padding stands at the end
        assert set(used.tolist()) == set(range(1, used.max() + 1))


def test_the_first_token_of_a_segment_never_counts():
    sample = Sample(np.arange(3, dtype=np.int32), np.ones(3, np.float32), "x")
    batch = fill([sample], [(0, 0), ()], 7, 0)
    assert batch["weights"].tolist() == [[0, 1, 1, 0, 1, 1, 0], [0] * 7]
    assert batch["segments"].tolist() == [[1, 1, 1, 2, 2, 2, 0], [0] * 7]


@given(
    st.lists(st.integers(1, 64), min_size=1, max_size=50),
    st.sampled_from([(64,), (8, 16, 64), (32, 48, 64)]),
    st.integers(1, 5),
)
@settings(max_examples=100, deadline=None)
def test_buckets_hold_every_sample_once(sizes, buckets, batch):
    found = into_buckets(sizes, buckets, batch)
    assert sorted(i for b in found for (i,) in b.rows) == list(range(len(sizes)))
    assert all(sizes[i] <= b.length for b in found for (i,) in b.rows)
    assert all(len(b.rows) % batch == 0 for b in found[:-1])
    assert [b.length for b in found] == sorted({b.length for b in found} & set(buckets))
    # never longer than what the fullest batches need
    assert batch > 1 or all(
        b.length == min(n for n in buckets if n >= sizes[i]) for b in found for (i,) in b.rows
    )


def test_default_buckets():
    assert default_buckets(2048) == (256, 512, 1024, 2048)
    assert default_buckets(20) == (20,)


@pytest.mark.parametrize("packing", [True, False])
def test_a_sample_longer_than_a_row_is_refused(packing):
    with pytest.raises(
        GptOssError, match=r"sample 1 has 65 tokens.* row 64: leave .*max_length=64"
    ):
        batches(made([3, 65]), packing=packing)


def mean_loss(params, batch):
    """Weighted cross-entropy, written out: token t is predicted from t - 1."""
    logits, _ = forward(
        params,
        jnp.asarray(batch["tokens"]),
        config=tiny.CONFIG,
        segments=jnp.asarray(batch["segments"]),
    )
    logs = jax.nn.log_softmax(logits[:, :-1])
    picked = jnp.take_along_axis(logs, jnp.asarray(batch["tokens"])[:, 1:, None], -1)[..., 0]
    return -(picked * batch["weights"][:, 1:]).sum()


def test_packed_loss_is_that_of_the_samples_alone():
    data = made([13, 9, 21, 5, 2, 30], vocabulary=tiny.CONFIG.vocab_size)
    packed, padded = (
        batches(data, length=32, batch=4),
        batches(data, length=32, batch=4, packing=False),
    )
    loss = jax.jit(mean_loss)
    alone = sum(
        loss(tiny.params(), fill(data.samples, [(i,)] * 4, 32, 0)) / 4
        for i in range(len(data.samples))
    )  # four times the same row, so that one program does
    for found in (packed, padded):
        total = sum(float(loss(tiny.params(), found[i])) for i in range(found.per_epoch))
        np.testing.assert_allclose(total, float(alone), rtol=2e-6)
    # and it matters: without segments the loss is another one
    merged = {**packed[0], "segments": np.minimum(packed[0]["segments"], 1)}
    assert abs(float(loss(tiny.params(), merged)) - float(loss(tiny.params(), packed[0]))) > 1e-2


# order


MODES = {
    "packed": {},
    "padded": {"packing": False},
    "padded to given lengths": {"packing": False, "buckets": (16, 40, 64)},
    "in the data's order": {"shuffle": False},
}


@pytest.mark.parametrize("mode", MODES)
def test_an_epoch_holds_every_sample_once(mode):
    data = made(lengths())
    found = batches(data, epochs=3, **MODES[mode])
    assert len(found) == 3 * found.per_epoch
    for epoch in range(3):
        numbers = range(epoch * found.per_epoch, (epoch + 1) * found.per_epoch)
        assert sorted(s for n in numbers for s in unpacked(found[n])) == whole(data)
    used = sum(len(s) for s in data.samples)
    room = sum(found[n]["tokens"].size for n in range(found.per_epoch))
    assert found.fill_share == pytest.approx(used / room)
    assert {found[n]["tokens"].shape for n in range(len(found))} == {(4, t) for t in found.lengths}


@pytest.mark.parametrize("mode", MODES)
def test_every_epoch_has_its_own_order(mode):
    found = batches(made(lengths()), **MODES[mode])
    first, second = (
        [found.members(n)[1] for n in range(e * found.per_epoch, (e + 1) * found.per_epoch)]
        for e in (0, 1)
    )
    assert (first == second) == (mode == "in the data's order")
    other = batches(made(lengths()), seed=1000, **MODES[mode])
    again = [other.members(n)[1] for n in range(other.per_epoch)]
    assert (first == again) == (mode == "in the data's order")


def test_another_program_makes_the_same_batches():
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; import test_packing as t, hashlib\n"
        "found = t.batches(t.made(t.lengths()), packing=False, seed=7)\n"
        "h = hashlib.sha256()\n"
        "[h.update(found[n][k].tobytes()) for n in range(30) for k in t.NAMES]\n"
        "print(h.hexdigest())"
    )
    here = subprocess.run(
        [sys.executable, "-c", code, str(Path(__file__).parent)],
        capture_output=True,
        text=True,
        check=True,
    ).stdout.split()[-1]
    ours = hashlib.sha256()
    found = batches(made(lengths()), packing=False, seed=7)
    for n in range(30):
        for name in NAMES:
            ours.update(found[n][name].tobytes())
    assert ours.hexdigest() == here


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("count", [2, 4])
def test_processes_share_every_batch(mode, count):
    data = made(lengths())
    alone = batches(data, epochs=2, **MODES[mode])
    parts = [
        batches(data, epochs=2, process_index=i, process_count=count, **MODES[mode])
        for i in range(count)
    ]
    for n in range(len(alone)):
        shares = [part[n] for part in parts]
        assert {share["tokens"].shape[0] for share in shares} == {4 // count}
        joined = {name: np.concatenate([share[name] for share in shares]) for name in NAMES}
        assert same(joined, alone[n])


# going on


@pytest.mark.parametrize("mode", MODES)
def test_a_run_goes_on_from_any_batch(mode):
    data = made(lengths())
    found = batches(data, epochs=3, **MODES[mode])
    iterator = iter(found)
    states, expected = [json.dumps(iterator.get_state())], []
    for batch in iterator:
        expected.append(batch)
        states.append(json.dumps(iterator.get_state()))
    assert len(expected) == len(found)
    for at, state in enumerate(states):
        # a new program: nothing but the data, the settings and the state
        again = iter(batches(made(lengths()), epochs=3, **MODES[mode]))
        again.set_state(json.loads(state))
        assert (again.step, again.epoch) == (at, at // found.per_epoch)
        got = list(itertools.islice(again, 3))
        assert len(got) == min(3, len(found) - at)
        assert all(same(a, b) for a, b in zip(got, expected[at : at + 3], strict=True))


def test_a_run_goes_on_twice_and_three_times():
    found = batches(made(lengths()), epochs=3)
    expected = list(found)
    got, state = [], iter(found).get_state()
    for steps in (1, 0, found.per_epoch, 2, len(found)):
        iterator = iter(batches(made(lengths()), epochs=3))
        next(iterator)  # what was read before does not matter
        iterator.set_state(state)
        assert iterator.get_state() == state
        got += itertools.islice(iterator, steps)
        state = json.loads(json.dumps(iterator.get_state()))
    assert len(got) == len(expected)
    assert all(same(a, b) for a, b in zip(got, expected, strict=True))


def test_a_run_goes_on_with_another_number_of_processes():
    data = made(lengths())
    alone = iter(batches(data))
    before = [next(alone) for _ in range(5)]
    assert len(before) == 5
    two = [iter(batches(data, process_index=i, process_count=2)) for i in (0, 1)]
    for part in two:
        part.set_state(alone.get_state())
    expected = next(alone)
    shares = [next(part) for part in two]
    assert same({n: np.concatenate([s[n] for s in shares]) for n in NAMES}, expected)


def test_without_a_number_of_epochs_there_is_no_end():
    found = batches(made(lengths(5)))
    iterator = iter(found)
    iterator.set_state({**iterator.get_state(), "step": 10**12})
    assert sum(1 for _ in itertools.islice(iterator, 3)) == 3
    assert iterator.step == 10**12 + 3


def test_more_epochs_go_on_where_fewer_ended():
    data = made(lengths())
    short = iter(batches(data, epochs=1))
    assert sum(1 for _ in short) == short.batches.per_epoch
    long = iter(batches(data, epochs=2))
    long.set_state(short.get_state())
    assert same(next(long), batches(data, epochs=2)[short.batches.per_epoch])


@pytest.mark.parametrize(
    ("keys", "field"),
    [
        ({"seed": 3}, "seed is 0, this one has 3"),
        ({"batch": 8}, "batch is 4, this one has 8"),
        ({"length": 128}, "length is 64, this one has 128"),
        ({"packing": False}, "packing is True, this one has False"),
        ({"shuffle": False}, "shuffle is True, this one has False"),
    ],
)
def test_a_position_of_another_run_is_refused(keys, field):
    state = iter(batches(made(lengths()))).get_state()
    with pytest.raises(GptOssError, match=f"the saved position is of a run whose {field}"):
        iter(batches(made(lengths()), **keys)).set_state(state)


def test_a_position_in_other_data_is_refused():
    state = iter(batches(made(lengths()))).get_state()
    with pytest.raises(GptOssError, match=r"of a run whose data is '[0-9a-f]{16}', this one has"):
        iter(batches(made(lengths(), seed=1))).set_state(state)
    with pytest.raises(GptOssError, match="whose version is 0, this one has 1"):
        iter(batches(made(lengths()))).set_state({**state, "version": 0})
    for step in (None, -1, 10**6, "1"):
        with pytest.raises(
            GptOssError, match=r"the saved position is batch .* of \d+: raise epochs"
        ):
            iter(batches(made(lengths()), epochs=1)).set_state({**state, "step": step})


@pytest.mark.parametrize(
    ("keys", "error"),
    [
        ({"length": 1}, "length is 1 and batch 8: expected at least 2 tokens"),
        ({"batch": 0}, "batch 0: expected"),
        ({"seed": -1}, "seed is -1: expected 0 to 4294967295"),
        ({"epochs": 0}, "epochs is 0: expected 1 or more, or None"),
        ({"process_index": 2, "process_count": 2}, "process_index is 2 of 2: expected 0 to 1"),
        ({"batch": 6, "process_count": 4}, "batch of 6 rows does not divide among 4 processes"),
        ({"buckets": (8, 2048)}, r"buckets are \(8, 2048\): expected .* packing=False"),
        ({"buckets": (8,), "packing": False}, "the longest bucket is 8, length 2048: make them"),
    ],
)
def test_settings_that_are_refused(keys, error):
    with pytest.raises(GptOssError, match=error):
        BatchSettings(**keys)


def test_without_grain_one_is_told(monkeypatch):
    monkeypatch.setitem(sys.modules, "grain", None)
    with pytest.raises(GptOssError, match=r"need grain: pip install 'gptoss_jax\[train\]'"):
        batches(made([5]))


def test_one_sample_is_enough():
    found = batches(made([5]), epochs=2)
    got = list(found)
    assert len(got) == 2
    assert [len(list(unpacked(b))) for b in got] == [1, 1]
