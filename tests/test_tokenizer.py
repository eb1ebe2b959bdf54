"""The vocabulary against openai-harmony's own encoder, pruned vocabularies, refusals, incremental
decoding."""

import base64
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptoss_jax import tokenizer as module
from gptoss_jax.chat.render import harmony
from gptoss_jax.errors import GptOssError
from gptoss_jax.tokenizer import HARMONY_SPECIALS, kept_ids, load_tokenizer, read_kept, write_kept

FULL = load_tokenizer()
TEXT = (
    "The sum of 12 and 345 is 357. Zażółć gęślą jaźń! 日本語 🧮\n\n  def f(x): return {'a': [1, 2]}"
)
text = st.one_of(
    st.text(), st.text("ab cdéß日🧮\n\t'<|1230{}"), st.sampled_from(list(HARMONY_SPECIALS))
)


def pruned_from(folder, ids, closed=True):
    write_kept(folder / "kept_tokens.txt", kept_ids(ids, closed=closed))
    return load_tokenizer(folder)


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    return pruned_from(tmp_path_factory.mktemp("pruned"), FULL.encode(TEXT))


@given(text)
@settings(max_examples=300, deadline=None)
def test_encodes_as_openai_harmony_does(x):
    ids = FULL.encode(x)
    assert ids == harmony().encode(x, disallowed_special=())
    assert FULL.decode(ids) == x


def test_known_ids():
    assert FULL.vocab_size == 201_088
    assert FULL.encode("assistant") == [173_781]
    assert FULL.encode("<|start|>") == [27, 91, 5236, 91, 29]
    assert FULL.special["<|start|>"] == 200_006
    assert FULL.stop_ids == (200_002, 200_012, 199_999)
    assert FULL.decode([200_006, 173_781, 201_087]) == "<|start|>assistant<|reserved_201087|>"
    assert FULL.to_harmony([0, 201_087]) == FULL.from_harmony([0, 201_087]) == [0, 201_087]
    assert {v: k for k, v in FULL.special.items()} == {
        i: harmony().decode([i]) for i in range(199_998, 201_088)
    }


def test_lone_surrogates_become_replacement_characters():
    assert FULL.decode(FULL.encode("a\ud800b")) == "a\ufffdb"


@pytest.mark.parametrize(
    "method", ["decode", "decode_bytes", "to_harmony", "from_harmony", "check"]
)
@pytest.mark.parametrize(
    ("ids", "message"),
    [
        (
            [5, 201_088],
            "token id 201088 at position 1 is outside the vocabulary: use ids from 0 to 201087",
        ),
        (
            [5, 6, -1, 300_000],
            "token id -1 at position 2 is outside the vocabulary: use ids from 0 to 201087",
        ),
        (
            [1.0],
            "expected integer token ids, got 1.0 at position 0: pass whole numbers "
            "from 0 to 201087",
        ),
        (
            ["a"],
            "expected integer token ids, got 'a' at position 0: pass whole numbers "
            "from 0 to 201087",
        ),
    ],
)
def test_ids_outside_the_vocabulary_are_refused(method, ids, message):
    with pytest.raises(GptOssError) as error:
        getattr(FULL, method)(ids)
    assert str(error.value) == message


def test_arrays_of_ids_are_ids():
    assert FULL.decode(np.asarray(FULL.encode("hello there"))) == "hello there"


@given(st.lists(st.integers(0, 201_087), max_size=30))
@settings(max_examples=200, deadline=None)
def test_incremental_decoding_adds_up(ids):
    decoder = FULL.decoder()
    assert "".join(map(decoder.feed, ids)) + decoder.flush() == FULL.decode(ids)


def test_a_character_comes_with_its_last_token(tmp_path):
    bytewise = pruned_from(tmp_path, [])
    ids = bytewise.encode("x🙂y")
    decoder = bytewise.decoder()
    assert [decoder.feed(token) for token in ids] == ["x", "", "", "", "🙂", "y"]
    assert decoder.flush() == ""
    assert decoder.feed(ids[1]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.feed(ids[0]) == "x"


@given(text)
@settings(max_examples=200, deadline=None)
def test_any_text_encodes_in_a_pruned_vocabulary(pruned, x):
    ids = pruned.encode(x)
    assert pruned.decode(ids) == x
    assert all(0 <= token < pruned.vocab_size for token in ids)
    assert not set(ids) & set(pruned.special.values())
    assert pruned.decode(pruned.from_harmony(FULL.encode(x))) == x


@given(st.lists(st.integers(0, 199_997), max_size=20))
@settings(max_examples=100, deadline=None)
def test_bytes_survive_the_way_into_a_pruned_vocabulary(pruned, ids):
    assert pruned.decode_bytes(pruned.from_harmony(ids)) == FULL.decode_bytes(ids)


def test_a_closed_vocabulary_encodes_its_text_as_the_full_one_does(pruned):
    assert pruned.to_harmony(pruned.encode(TEXT)) == FULL.encode(TEXT)
    assert pruned.from_harmony(FULL.encode(TEXT)) == pruned.encode(TEXT)


@given(st.text("abcdefghij THE123'.,\n{}", max_size=60))
@settings(max_examples=60, deadline=None)
def test_closure_is_enough_for_any_text(tmp_path_factory, x):
    small = pruned_from(tmp_path_factory.mktemp("closed"), FULL.encode(x))
    assert small.to_harmony(small.encode(x)) == FULL.encode(x)


def test_kept_ids():
    assert kept_ids([], closed=False) == kept_ids([])
    assert len(kept_ids([])) == 256 + 9
    kept = kept_ids([173_781], closed=False)
    assert kept == sorted(kept)
    assert len(kept) == 256 + 9 + 1
    closed = kept_ids([173_781])
    assert set(closed) > set(kept)
    # every kept word is made of two kept parts
    words = {FULL.decode_bytes([token]) for token in closed if token < 199_998}
    assert all(
        any(word[:i] in words and word[i:] in words for i in range(1, len(word)))
        for word in words
        if len(word) > 1
    )
    with pytest.raises(GptOssError, match="token id 201088"):
        kept_ids([201_088])


def test_compact_ids_are_row_numbers(tmp_path):
    small = pruned_from(tmp_path, [173_781], closed=False)
    rows = read_kept(tmp_path / "kept_tokens.txt")
    assert small.kept == tuple(rows) == tuple(kept_ids([173_781], closed=False))
    assert small.vocab_size == len(rows)
    assert small.to_harmony(range(small.vocab_size)) == rows
    assert small.encode("assistant") == [rows.index(173_781)]
    assert small.special["<|call|>"] == rows.index(200_012)
    assert small.stop_ids == tuple(rows.index(i) for i in (200_002, 200_012, 199_999))
    header = [200_006, 173_781, 200_005, 17_196, 200_008]
    assert (
        small.decode(small.from_harmony(header)) == "<|start|>assistant<|channel|>final<|message|>"
    )
    with pytest.raises(
        GptOssError, match="token id 200013 at position 1 is not a control token of this pruned"
    ):
        small.from_harmony([5, 200_013])
    with pytest.raises(GptOssError, match=f"use ids from 0 to {small.vocab_size - 1}"):
        small.decode([small.vocab_size])


def test_a_pruned_vocabulary_loads_without_the_big_table(tmp_path, monkeypatch):
    pruned_from(tmp_path, FULL.encode(TEXT))

    def never():
        raise AssertionError("the big table was read")

    monkeypatch.setattr(module, "_table", never)
    small = load_tokenizer(tmp_path)
    assert small.decode(small.encode(TEXT)) == TEXT


def test_bare_ids_load_too(tmp_path):
    ids = kept_ids(FULL.encode(TEXT))
    (tmp_path / "kept_tokens.txt").write_text("".join(f"{token}\n" for token in ids))
    small = load_tokenizer(tmp_path)
    assert small.to_harmony(small.encode(TEXT)) == FULL.encode(TEXT)


def test_a_folder_without_a_list_has_the_full_vocabulary(tmp_path):
    assert load_tokenizer(tmp_path) is FULL


def replace_line(lines, number, new):
    return [*lines[:number], *([] if new is None else [new]), *lines[number + 1 :]]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda rows: replace_line(rows, 3, "x"),
            "line 4: expected an o200k_harmony id from 0 to 201087",
        ),
        (
            lambda rows: replace_line(rows, 3, "201088"),
            "line 4: expected an o200k_harmony id from 0 to 201087",
        ),
        (
            lambda rows: replace_line(rows, 3, rows[4]),
            "line 5: ids must ascend, got 4 after 4: sort the file",
        ),
        (lambda rows: replace_line(rows, 3, None), "lacks byte 36 and 0 more"),
        (lambda rows: rows[:-1], r"lacks <\|call\|> and 0 more"),
        (
            lambda rows: replace_line(rows, 3, "3\t!"),
            "line 4: '!' is not base64: write the file again",
        ),
        (lambda rows: replace_line(rows, 3, "3\tIQ=="), r"line 4: the bytes b'!' come twice"),
    ],
)
def test_damaged_lists_are_refused(tmp_path, damage, message):
    file = tmp_path / "kept_tokens.txt"
    write_kept(file, kept_ids([]))
    file.write_text("\n".join(damage(file.read_text().splitlines())))
    with pytest.raises(GptOssError, match=message):
        load_tokenizer(tmp_path)


def test_bytes_of_another_token_are_noticed(tmp_path):
    file = tmp_path / "kept_tokens.txt"
    write_kept(file, kept_ids([173_781], closed=False))
    right, wrong = (base64.b64encode(word).decode() for word in (b"assistant", b"assistent"))
    file.write_text(file.read_text().replace(right, wrong))
    with pytest.raises(
        GptOssError, match="says token 173781 is b'assistent', but o200k has b'assistant'"
    ):
        load_tokenizer(tmp_path).from_harmony([173_781])


def test_another_vocabulary_is_refused(tmp_path, monkeypatch):
    wrong = tmp_path / "o200k_base.tiktoken"
    wrong.write_bytes(module.VOCAB_FILE.read_bytes()[:-1])
    module._table.cache_clear()
    monkeypatch.setattr(module, "VOCAB_FILE", wrong)
    try:
        with pytest.raises(
            GptOssError, match=f"has sha256 [0-9a-f]{{64}}, expected {module.VOCAB_SHA256}: install"
        ):
            kept_ids([])
        monkeypatch.setattr(module, "VOCAB_FILE", tmp_path / "none")
        with pytest.raises(
            GptOssError, match=r"cannot read the vocabulary .*: No such file or directory: install"
        ):
            kept_ids([])
    finally:
        module._table.cache_clear()


def test_importing_loads_no_model_library():
    code = """
import sys, gptoss_jax.tokenizer
print([name for name in ("jax", "flax", "openai_harmony") if name in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
