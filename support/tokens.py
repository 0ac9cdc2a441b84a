"""Token ids of the pieces of a text, and the text of sampled token ids.

SentencePiece tokenizers write a space as "▁" and put one in front of a text ("four" -> "▁four"), and some of them in
front of what follows an added token too. A response is not the beginning of a text. It is therefore tokenised behind an
anchor, whose ids are then cut off: its ids are those that it has in the joined text. No token crosses the boundary.
"""

import hashlib
import json
from collections.abc import Iterable, Sequence

ANCHORS = (":", "\n", ".", "a", "0")  # stand for ordinary text; the first that does not merge with the piece is used
PROBES = ("four", " four", "\nfour", "Four five")
Context = str | None  # what precedes a piece: "" nothing, None ordinary text, else an added token


def _ids(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _behind(tokenizer, anchor: str, texts: Sequence[str]) -> list[list[int] | None]:
    """The ids of each text behind the anchor, without the anchor's. None if a token crosses the boundary."""
    [start] = _ids(tokenizer, [anchor])
    if not texts or not start:
        return [None] * len(texts)
    spans = {"return_offsets_mapping": True} if tokenizer.is_fast and anchor in ANCHORS else {}
    joined = tokenizer([anchor + text for text in texts], add_special_tokens=False, verbose=False, **spans)
    out = []
    for i, ids in enumerate(joined["input_ids"]):
        clean = ids[: len(start)] == start and (
            not spans or joined["offset_mapping"][i][len(start) - 1][1] <= len(anchor)
        )
        out.append(ids[len(start) :] if clean else None)
    return out


def _in_context(tokenizer, context: Context, texts: Sequence[str]) -> dict[str, list[int]]:
    """The ids of texts that follow `context`. A text that merges with every anchor is tokenised alone."""
    out: dict[str, list[int]] = {}
    for anchor in () if context == "" else (ANCHORS if context is None else (context, *ANCHORS)):
        left = [text for text in texts if text not in out]
        out |= {text: ids for text, ids in zip(left, _behind(tokenizer, anchor, left), strict=True) if ids is not None}
    left = [text for text in texts if text not in out]
    return out | dict(zip(left, _ids(tokenizer, left), strict=True))


class Pieces:
    """Tokenises pieces of texts by what precedes them. Byte-level and word tokenizers give the same ids anywhere, and
    every piece is then tokenised alone."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.alone = dict(zip(PROBES, _ids(tokenizer, PROBES), strict=True))
        self.by_context = _in_context(tokenizer, None, PROBES) != self.alone
        self.added = {token.content: token.rstrip for token in tokenizer.added_tokens_decoder.values()}
        self.restarts: dict[str, bool] = {}  # added token -> whether what follows it begins like a text

    def context(self, before: str) -> Context:
        """What precedes a piece, as far as it decides the ids: an added token includes the whitespace it swallows."""
        if not before or not self.by_context:
            return ""
        stripped = before.rstrip()
        ends = [x for x, rstrip in self.added.items() if (stripped if rstrip else before).endswith(x)]
        return before[before.rindex(max(ends, key=len)) :] if ends else None

    def encode(self, pieces: Iterable[tuple[Context, str]]) -> dict[tuple[Context, str], list[int]]:
        """The ids of each (context, text)."""
        texts: dict[Context, set[str]] = {}
        for context, text in pieces:
            texts.setdefault(context, set()).add(text)
        groups = {context: _in_context(self.tokenizer, context, sorted(group)) for context, group in texts.items()}
        return {(context, text): ids for context, group in groups.items() for text, ids in group.items()}

    def decode(self, context: Context, ids: Sequence[int]) -> str:
        """The text of ids that follow `context`, without special tokens: "▁four" in mid-text is " four"."""
        plain = self.tokenizer.decode(ids, skip_special_tokens=True)
        if context == "" or context is not None and self._restarts(context):
            return plain
        [anchor] = _ids(self.tokenizer, ANCHORS[:1])
        start = self.tokenizer.decode(anchor, skip_special_tokens=True)
        joined = self.tokenizer.decode([*anchor, *ids], skip_special_tokens=True)
        return joined[len(start) :] if joined.startswith(start) else plain

    def _restarts(self, context: str) -> bool:
        if context not in self.restarts:
            self.restarts[context] = (
                _in_context(self.tokenizer, context, PROBES[:1])[PROBES[0]] == self.alone[PROBES[0]]
            )
        return self.restarts[context]


def digest(tokenizer) -> str:
    """16 hexadecimal digits of the vocabulary, added tokens included: token ids mean the same under the same digest."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]
