"""Token ids of the pieces of a text, and the text of sampled token ids.

The ids of a piece depend on what precedes it. A pattern that splits texts looks back: ":(five)" is ":(", "five" and
")", while "(five)" is "(five" and ")". SentencePiece writes a space as "▁" and puts one in front of a text ("four" ->
"▁four"), often in front of what follows an added token too. A response is therefore tokenised together with the end of
the text before it, whose ids are then cut off: its ids are those that it has in the joined text. Where a token of the
joined text crosses the boundary, the boundary stays, and the response gets the ids that it has after other text.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Sequence

TAIL = 32  # characters before a piece that decide its ids, if its last word is as long
ANCHORS = (":", "\n", ".", "a", "0")  # stand for other text; the first that does not merge with the piece is used
PROBES = ("four", " four", "\nfour", "Four five")


def _ids(tokenizer, texts: Sequence[str]) -> list[list[int]]:
    return tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"] if texts else []


def _behind(tokenizer, pieces: Sequence[tuple[str, str]], swallowing: bool = False) -> list[list[int] | None]:
    """The ids of each text behind its context, without the context's. None if a token crosses the boundary. With
    `swallowing` the contexts end in added tokens, whose span may cross it, because it includes whitespace."""
    if not pieces:
        return []
    contexts, unknown = [*dict.fromkeys(context for context, _ in pieces)], tokenizer.unk_token_id
    starts = dict(zip(contexts, _ids(tokenizer, contexts), strict=True))
    joined = tokenizer([context + text for context, text in pieces], add_special_tokens=False, verbose=False)
    out: list[list[int] | None] = []
    for i, (ids, (context, _)) in enumerate(zip(joined["input_ids"], pieces, strict=True)):
        n = len(starts[context])
        clean = n > 0 and ids[:n] == starts[context]
        if clean and not swallowing:  # the same ids may span more text, such as UNK
            clean = _parts_at(joined.encodings[i], n, len(context)) if tokenizer.is_fast else ids[n - 1] != unknown
        out.append(ids[n:] if clean else None)
    return out


def _parts_at(encoding, n: int, character: int) -> bool:
    """Whether the first n tokens are those of the text before this character."""
    last = encoding.token_to_chars(n - 1)
    first = encoding.token_to_chars(n) if n < len(encoding) else None
    return (last is None or last[1] <= character) and (first is None or first[0] >= character)


def _mid_text(tokenizer, texts: Sequence[str]) -> dict[str, list[int]]:
    """The ids of texts that follow some other text. A text that merges with every anchor is tokenised alone."""
    out: dict[str, list[int]] = {}
    for anchor in ANCHORS:
        left = [text for text in texts if text not in out]
        ids_of = zip(left, _behind(tokenizer, [(anchor, text) for text in left]), strict=True)
        out |= {text: ids for text, ids in ids_of if ids is not None}
    left = [text for text in texts if text not in out]
    return out | dict(zip(left, _ids(tokenizer, left), strict=True))


class Pieces:
    """Tokenises pieces of texts by what precedes them."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.added = {x.content: x.rstrip for x in tokenizer.added_tokens_decoder.values() if x.content}
        self.longest = max(map(len, self.added), default=0)
        names = sorted(self.added, key=len, reverse=True)
        self.pattern = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self.alone = dict(zip(PROBES, _ids(tokenizer, PROBES), strict=True))
        self.marks_beginnings = _mid_text(tokenizer, PROBES) != self.alone  # "▁four", and "four" in mid-text
        backend = getattr(tokenizer, "backend_tokenizer", None)
        kinds = [type(getattr(backend, part, None)).__name__ for part in ("model", "pre_tokenizer")]
        self.by_words = kinds in (["WordLevel", "Whitespace"], ["WordLevel", "WhitespaceSplit"])  # no context matters
        self.restarts: dict[str, bool] = {}  # added token -> whether what follows it begins like a text

    def context(self, before: str) -> str:
        """The end of the text before a piece, as far as it decides the ids: its last word, of which TAIL characters are
        enough. It begins with an added token if one is there, because no word goes on across it."""
        if self.by_words:
            return ""
        stripped = before.rstrip()
        near = before[max(len(stripped) - TAIL - self.longest, 0) :]
        stripped = near.rstrip()
        word = len(stripped[: len(stripped) - len(stripped.split()[-1])].rstrip()) if stripped else 0
        word = max(word, len(stripped) - TAIL)
        for match in self.pattern.finditer(near):
            word = match.start() if match.end() >= word else word
        return near[word:]

    def _swallows(self, token: str, rest: str) -> bool:
        return not rest or self.added[token] and not rest.strip()

    def _is_added(self, context: str) -> bool:
        """Whether the context is an added token, perhaps with whitespace that it swallows."""
        match = self.pattern.match(context)
        return match is not None and self._swallows(match[0], context[match.end() :])

    def _begins_text(self, context: str) -> bool:
        """Whether ordinary text behind this context has the ids of a text that nothing precedes."""
        if not self.marks_beginnings or context == "":
            return True
        if not self._is_added(context):
            return False
        if context not in self.restarts:
            self.restarts[context] = _behind(self.tokenizer, [(context, PROBES[0])], True) == [self.alone[PROBES[0]]]
        return self.restarts[context]

    def encode(self, pieces: Iterable[tuple[str, str]]) -> dict[tuple[str, str], list[int]]:
        """The ids of each (context, text): those of the joined text, unless a token crosses the boundary."""
        out: dict[tuple[str, str], list[int]] = {}
        groups: dict[bool, list[tuple[str, str]]] = {True: [], False: []}  # whether behind an added token -> pieces
        first, crossing = [], []
        for piece in sorted(set(pieces)):
            if piece[0]:
                groups[self._is_added(piece[0])].append(piece)
            else:
                first.append(piece)
        for added, group in groups.items():
            ids_of = dict(zip(group, _behind(self.tokenizer, group, added), strict=True))
            out |= {piece: ids for piece, ids in ids_of.items() if ids is not None}
            crossing += [piece for piece, ids in ids_of.items() if ids is None]
        alone = first + [piece for piece in crossing if self._begins_text(piece[0])]
        out |= zip(alone, _ids(self.tokenizer, [text for _, text in alone]), strict=True)
        others = [piece for piece in crossing if piece not in out]
        ids_of_text = _mid_text(self.tokenizer, [*dict.fromkeys(text for _, text in others)])
        return out | {piece: ids_of_text[piece[1]] for piece in others}

    def decode(self, context: str, ids: Sequence[int]) -> str:
        """The text of ids that follow `context`, without special tokens: "▁four" in mid-text is " four"."""
        plain = self.tokenizer.decode(ids, skip_special_tokens=True)
        if self._begins_text(context):
            return plain
        [anchor] = _ids(self.tokenizer, ANCHORS[:1])
        start = self.tokenizer.decode(anchor, skip_special_tokens=True)
        joined = self.tokenizer.decode([*anchor, *ids], skip_special_tokens=True)
        return joined[len(start) :] if joined.startswith(start) else plain

    def spells(self, ids: Sequence[int], text: str) -> bool:
        """Whether these ids are the text, whatever precedes them."""
        return text in (self.decode(context, ids) for context in ("", ANCHORS[0]))


def digest(tokenizer) -> str:
    """16 hexadecimal digits of the vocabulary, added tokens included: token ids mean the same under the same digest."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]
