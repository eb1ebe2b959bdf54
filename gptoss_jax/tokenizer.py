"""Text to token ids and back: o200k_harmony from the bundled vocabulary, or a subset of it. No
network, ever.

Knows the vocabulary file, the control tokens' names, and how a pruned vocabulary is stored. Refuses
to know what a conversation is: ordinary text goes in and out, and a control token's text inside it
is ordinary text.

A pruned vocabulary is a file `kept_tokens.txt` beside a checkpoint, one token a line in ascending
order of its o200k_harmony id, so that the row number is the id in the pruned model and the order of
BPE merges is kept. A line is

    id <TAB> base64 of the token's bytes        (or a control token's name; `write_kept`)
    id                                          (also read, but needs the 3.6 MB table)

The bytes are there so that a small model loads in milliseconds without the big table.
"""

import base64
import codecs
import functools
import hashlib
import itertools
import os
import re
from binascii import Error as Base64Error
from binascii import a2b_base64
from collections.abc import Iterable, Sequence
from operator import index
from pathlib import Path

import tiktoken

from gptoss_jax.errors import GptOssError

VOCAB_FILE = Path(__file__).parent / "assets" / "o200k_base.tiktoken"
VOCAB_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
KEPT_FILE = "kept_tokens.txt"

ORDINARY = 199_998  # ids below are BPE tokens, from here on control tokens
VOCAB_SIZE = 201_088  # rows of the embedding; the 201088th name, <|reserved_201088|>, has none

HARMONY_SPECIALS = {
    "<|startoftext|>": 199_998,
    "<|endoftext|>": 199_999,
    "<|return|>": 200_002,
    "<|constrain|>": 200_003,
    "<|channel|>": 200_005,
    "<|start|>": 200_006,
    "<|end|>": 200_007,
    "<|message|>": 200_008,
    "<|call|>": 200_012,
}

_NOT_UTF8 = re.compile("([\udc80-\udcff]+)")  # how surrogateescape spells bytes that are not UTF-8

# how o200k_base splits text first (tiktoken_ext/openai_public.py): words, digits by three, ...
_ENDING = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
PATTERN = "|".join(
    [
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_ENDING}",
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_ENDING}",
        r"\p{N}{1,3}",
        r" ?[^\s\p{L}\p{N}]+[\r\n/]*",
        r"\s*[\r\n]+",
        r"\s+(?!\S)",
        r"\s+",
    ]
)


class Tokenizer:
    """One vocabulary: `ranks` (token bytes -> id) and `special` (control token's name -> id), ids
    without gaps.

    `kept` holds the o200k_harmony id of each row of a pruned vocabulary and is None for the full
    one. Use `load_tokenizer`. Every method that takes ids raises GptOssError for the first one
    outside the vocabulary.
    """

    def __init__(
        self, ranks: dict[bytes, int], special: dict[str, int], kept: Sequence[int] | None = None
    ):
        self.special = dict(special)
        self.vocab_size = len(ranks) + len(special)
        self.stop_ids = tuple(special[name] for name in ("<|return|>", "<|call|>", "<|endoftext|>"))
        self.kept = None if kept is None else tuple(kept)
        self._compact = None if kept is None else {full: row for row, full in enumerate(kept)}
        self._checked = False
        self._encoding = tiktoken.Encoding(
            "o200k_harmony" if kept is None else f"o200k_harmony/{self.vocab_size}",
            pat_str=PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self.special,
        )

    def __repr__(self) -> str:
        return f"Tokenizer({self._encoding.name}, vocab_size={self.vocab_size})"

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text; `<|start|>` and its kind are spelled out, lone surrogates become
        U+FFFD."""
        return self._encoding.encode_ordinary(text)

    def decode(self, ids: Iterable[int]) -> str:
        """Text of ids; control tokens appear by name, bytes that are not UTF-8 as U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The ids' bytes, joined."""
        return self._encoding.decode_bytes(self.check(ids))

    def check(self, ids: Iterable[int]) -> list[int]:
        """The ids as a list of int, or a GptOssError that names the first one which is not in the
        vocabulary."""
        out = []
        for position, token in enumerate(ids):
            try:
                value = index(token)
            except TypeError:
                raise GptOssError(
                    f"expected integer token ids, got {token!r} at position {position}: pass whole "
                    "numbers from 0 to "
                    f"{self.vocab_size - 1}"
                ) from None
            if not 0 <= value < self.vocab_size:
                raise GptOssError(
                    f"token id {value} at position {position} is outside the vocabulary: use ids "
                    "from 0 to "
                    f"{self.vocab_size - 1}"
                )
            out.append(value)
        return out

    def decoder(self) -> "Utf8Decoder":
        """A fresh incremental decoder: feed(id) -> text that is complete by now, flush() -> the
        rest."""
        return Utf8Decoder(self)

    def to_harmony(self, ids: Iterable[int]) -> list[int]:
        """This vocabulary's ids -> o200k_harmony ids, one for one."""
        ids = self.check(ids)
        return ids if self.kept is None else [self.kept[i] for i in ids]

    def from_harmony(self, ids: Iterable[int]) -> list[int]:
        """o200k_harmony ids -> this vocabulary's ids: control tokens one for one, the text between
        them re-encoded.

        The pruned result may be longer than the input. Raises GptOssError for a control token that
        was not kept.
        """
        if self._compact is None:
            return self.check(ids)
        self._check_kept()
        lines = _table()
        out: list[int] = []
        stretch: list[bytes] = []
        for position, token in enumerate(ids):
            if 0 <= token < ORDINARY:
                stretch.append(_token_bytes(lines, token))
                continue
            out += self._encode_bytes(b"".join(stretch))
            stretch = []
            if token not in self._compact:
                raise GptOssError(
                    f"token id {token} at position {position} is not a control token of this "
                    "pruned vocabulary: "
                    f"expected an ordinary token (0 to {ORDINARY - 1}) or one of "
                    f"{sorted(self.special)}"
                )
            out.append(self._compact[token])
        return out + self._encode_bytes(b"".join(stretch))

    def _encode_bytes(self, data: bytes) -> list[int]:
        """Ids of bytes; what is not UTF-8 (half a character at a cut) goes byte by byte."""
        out: list[int] = []
        for part in _NOT_UTF8.split(data.decode("utf-8", errors="surrogateescape")):
            if _NOT_UTF8.match(part):
                raw = part.encode("utf-8", errors="surrogateescape")
                out += [self._encoding.encode_single_token(bytes([byte])) for byte in raw]
            else:
                out += self._encoding.encode_ordinary(part)
        return out

    def _check_kept(self) -> None:
        """Once, when the big table is read anyway: are the stored bytes those of the stored ids?"""
        if self._checked or self.kept is None:
            return
        lines = _table()
        for row, full in enumerate(self.kept):
            if full < ORDINARY:
                stored, true = (
                    self._encoding.decode_single_token_bytes(row),
                    _token_bytes(lines, full),
                )
                if stored != true:
                    raise GptOssError(
                        f"{KEPT_FILE}: row {row} says token {full} is {stored!r}, but o200k has "
                        f"{true!r}: "
                        "write the file again with gptoss_jax.tokenizer.write_kept"
                    )
        self._checked = True


class Utf8Decoder:
    """Ids one by one -> text, holding back the first bytes of a character until the rest has come.

    Bytes that can no longer become a character come out as U+FFFD, so the concatenation of
    everything fed and flushed equals `Tokenizer.decode` of all ids.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, token: int) -> str:
        """The text that this token completes ("" in the middle of a character)."""
        return self._utf8.decode(self._tokenizer.decode_bytes([token]))

    def flush(self) -> str:
        """U+FFFD for an unfinished character, else ""; the decoder is empty afterwards."""
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


def load_tokenizer(path: str | os.PathLike[str] | None = None) -> Tokenizer:
    """The tokenizer of a checkpoint folder: pruned when it holds kept_tokens.txt, otherwise the
    full o200k_harmony.

    The full one is made once (about 0.15 s) and shared; a pruned one of a few thousand tokens loads
    in milliseconds. Raises GptOssError when the vocabulary file is not the expected one or
    kept_tokens.txt is malformed.
    """
    if path is not None and (file := Path(path) / KEPT_FILE).is_file():
        return _load_pruned(file)
    return _load_full()


def kept_ids(ids: Iterable[int], closed: bool = True) -> list[int]:
    """The o200k_harmony ids of a pruned vocabulary that covers `ids`, ascending.

    Always added: the 256 single bytes (so that any text still encodes) and the nine harmony control
    tokens. `closed` also adds every token that BPE passes through on its way to a kept one; with
    these, text whose full encoding uses only kept tokens has exactly that encoding in the pruned
    vocabulary too (without them such a token is found only where it is a whole word).
    """
    lines = _table()
    kept = set(HARMONY_SPECIALS.values())
    kept.update(token for token in range(256) if len(_token_bytes(lines, token)) == 1)
    assert len(kept) == 256 + len(HARMONY_SPECIALS)
    wanted = _load_full().check(ids)
    kept.update(wanted)
    if closed:
        ranks = _ranks()
        stack = [token for token in set(wanted) if token < ORDINARY]
        seen = set(stack)
        while stack:
            for part in _last_merge(_token_bytes(lines, stack.pop()), ranks):
                if part not in seen:
                    seen.add(part)
                    stack.append(part)
        kept |= seen
    return sorted(kept)


def write_kept(path: str | os.PathLike[str], ids: Iterable[int]) -> None:
    """Writes a kept_tokens.txt (see the module's docstring) for ids as `kept_ids` returns them."""
    lines = _table()
    names = {token: name for name, token in _full_specials().items()}
    rows = []
    for token in ids:
        rows.append(
            f"{token}\t{lines[token].split()[0].decode() if token < ORDINARY else names[token]}\n"
        )
    temporary = Path(path).with_name(Path(path).name + ".tmp")
    temporary.write_text("".join(rows), encoding="ascii")
    os.replace(temporary, path)


def read_kept(path: str | os.PathLike[str]) -> list[int]:
    """The ids in a kept-tokens file (any order, bytes optional): what `kept_ids` and --keep-tokens
    take."""
    return [token for token, _ in _read_rows(Path(path))]


def _read_rows(file: Path) -> list[tuple[int, str]]:
    rows = []
    for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
        token, _, rest = line.partition("\t")
        if not token.strip().isdecimal() or int(token) >= VOCAB_SIZE:
            raise GptOssError(
                f"{file}, line {number}: expected an o200k_harmony id from 0 to {VOCAB_SIZE - 1}, "
                "optionally a tab and "
                f"the token's bytes in base64, got {line[:60]!r}"
            )
        rows.append((int(token), rest.strip()))
    return rows


def _load_pruned(file: Path) -> Tokenizer:
    rows = _read_rows(file)
    names: dict[int, str] = {token: name for name, token in HARMONY_SPECIALS.items()}
    ranks: dict[bytes, int] = {}
    special: dict[str, int] = {}
    last = -1
    for row, (token, text) in enumerate(rows):
        if token <= last:
            raise GptOssError(
                f"{file}, line {row + 1}: ids must ascend, got {token} after {last}: sort the file"
            )
        last = token
        if token >= ORDINARY:
            special[names.get(token, f"<|reserved_{token}|>")] = row
            continue
        try:
            data = base64.b64decode(text, validate=True) if text else _token_bytes(_table(), token)
        except Base64Error:
            raise GptOssError(
                f"{file}, line {row + 1}: {text[:60]!r} is not base64: write the file again"
            ) from None
        if data in ranks:
            raise GptOssError(
                f"{file}, line {row + 1}: the bytes {data!r} come twice: write the file again"
            )
        ranks[data] = row
    missing = [f"byte {byte}" for byte in range(256) if bytes([byte]) not in ranks]
    missing += [name for name in HARMONY_SPECIALS if name not in special]
    if missing:
        raise GptOssError(
            f"{file} lacks {missing[0]} and {len(missing) - 1} more of the 256 bytes and the "
            "harmony control tokens: "
            "make the list with gptoss_jax.tokenizer.kept_ids"
        )
    return Tokenizer(ranks, special, kept=[token for token, _ in rows])


@functools.cache
def _load_full() -> Tokenizer:
    return Tokenizer(_ranks(), _full_specials())


def _full_specials() -> dict[str, int]:
    names = {token: name for name, token in HARMONY_SPECIALS.items()}
    return {
        names.get(token, f"<|reserved_{token}|>"): token for token in range(ORDINARY, VOCAB_SIZE)
    }


@functools.cache
def _table() -> list[bytes]:
    """The vocabulary file's lines, `base64 id`, where line i is token i; checked against its
    sha256."""
    try:
        data = VOCAB_FILE.read_bytes()
    except OSError as error:
        raise GptOssError(
            f"cannot read the vocabulary {VOCAB_FILE}: {error.strerror}: install the package again"
        ) from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != VOCAB_SHA256:
        raise GptOssError(
            f"the vocabulary {VOCAB_FILE} has sha256 {digest}, expected {VOCAB_SHA256}: install "
            "the package again"
        )
    return data.splitlines()


def _token_bytes(lines: list[bytes], token: int) -> bytes:
    return a2b_base64(lines[token].partition(b" ")[0])


@functools.cache
def _ranks() -> dict[bytes, int]:
    """Token bytes -> id of all 199,998 BPE tokens. Ids ascend without gaps in the file, so the line
    number is the id."""
    parts = b"\n".join(_table()).split()
    return dict(zip(map(a2b_base64, parts[::2]), range(len(parts) // 2), strict=True))


def _last_merge(data: bytes, ranks: dict[bytes, int]) -> tuple[int, ...]:
    """The two tokens whose merge makes the token `data` (BPE with all tokens of lower rank); () for
    a single byte."""
    limit = ranks[data]
    parts = [data[i : i + 1] for i in range(len(data))]
    while len(parts) > 2:
        merges = [
            (ranks.get(a + b, limit), i) for i, (a, b) in enumerate(itertools.pairwise(parts))
        ]
        rank, i = min(merges)
        if rank >= limit:
            break
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return tuple(ranks[part] for part in parts) if len(parts) == 2 else ()
