"""Turn rows into token ids: prompts with their responses, and a report on the data.

    load        read the examples of a source and print the data report; all scripts use it
    build       rows -> Examples, and a Report of what was kept, truncated and dropped
    held_out    split by the hash of the prompt, so that equal prompts stay together
    show        format an example token by token

The columns of a row decide its form. A prompt or response is a string or a list of {"role", "content"} messages:

    SFT         prompt, completion | messages | text
    preference  prompt, chosen, rejected | chosen, rejected that are whole dialogues; optional margin, probability
    ranking     prompt, responses, ranks        (1 is best, equal is a tie); optional ended, rewards and noise
    unpaired    prompt, completion, label | messages, label       (KTO)
    prompts     prompt | any form that has one

A response can have several turns, such as those of two dialogues that part before their last turn. Then the prompt ends
where they part, the assistant's turns from there on are trained, and the user's are read only (`Example.trained`).
Messages {"from", "value"}, as ShareGPT has them in `conversations`, are read too.
A row without `prompt` may have it in `question`, `instruction`, `query` or `input`, if just one of these is filled.
The prompt is tokenised by itself, and a response has the ids that it has behind it (support/tokens.py), so that no
token spans the boundary. Strings are used unchanged: if a space belongs between prompt and response, the data must
contain it. Messages are rendered with the tokenizer's chat template, or with HH_TEMPLATE if it has none, which is then
saved with the model. Their other fields (tool_calls, reasoning_content) and the columns `tools` and `system` go to the
template too; a field that the template drops is refused. Columns that do not reach the model are listed in the report.

A sampled response that was truncated (`ended` is false, from sample.py) is its own tokens behind the prompt's: no EOS
and nothing of the template. Where a row has the sampled `token_ids` and the digest of this very `tokenizer`, they are
the responses. For rankings by a simulated annotator (annotate.py --by), `rewards` are the true rewards of the
responses, and `noise` is the scale of the noise.
"""

import gc
import hashlib
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rlhf import BadInput, require
from support import one_line, reviews, tokens
from support.agreement import better_pairs
from support.rows import (
    EMPTY,
    MESSAGES_TEXT,
    ROLES,
    SCORES,
    SPEAKERS,
    Dropped,
    Message,
    Row,
    asked_by_user,
    check_messages,
    check_prompt,
    check_response,
    check_text,
    content_text,
    fields_of,
    from_sharegpt,
    implicit,
    in_messages,
    json_arguments,
    optional_list,
    optional_number,
    prompt_columns,
    prompt_of,
    read_rows,
    shared_beginning,
    shared_turns,
    sources,
    standard,
    tools_of,
    with_system,
)

KINDS = {  # what a script trains on -> the row forms it accepts; the first that matches is used
    "sft": [["prompt", "completion"], ["messages"], ["text"], ["prompt", "chosen", "rejected"], ["chosen", "rejected"]],
    "preference": [["prompt", "responses", "ranks"], ["prompt", "chosen", "rejected"], ["chosen", "rejected"]],
    "unpaired": [
        ["prompt", "completion", "label"],
        ["prompt", "chosen", "rejected"],
        ["chosen", "rejected"],
        ["messages", "label"],
    ],
    "prompts": [["prompt"], ["chosen", "rejected"], ["messages"]],
    "responses": [["prompt", "responses"]],  # to be scored: they need no ranks, and none is dropped
}
STRINGS_AND_TOOLS = "field 'tools' goes with messages, and the row is of strings: give it as messages, or leave it out"
HH_TEMPLATE = (  # "\\n\\nHuman: ...\\n\\nAssistant: ...", as in hh-rlhf
    r"{% for m in messages %}"
    r"{{ '\n\n' + ('Human' if m['role'] == 'user' else m['role'] | capitalize) + ': ' + m['content'] }}{% endfor %}"
    r"{% if add_generation_prompt %}{{ '\n\nAssistant:' }}{% endif %}"
)
OF_RANKINGS = ("ended", "rewards", "noise", "token_ids", "tokenizer")  # columns beside responses and ranks
ANNOTATIONS = ("annotator", "order", "seconds", "note", "time")  # what annotate.py writes beside these
OF_PAIRS = {  # kind -> columns that are read beside chosen and rejected, in addition to SCORES
    "preference": ("margin", "probability"),
    "unpaired": ("probability",),
}
OF_ANSWERS = ("completion", "label", "chosen", "rejected", "responses", "ranks", *OF_RANKINGS, *OF_PAIRS["preference"])
OF_ANSWERS += ("tokens", "logps", "ref_logps")
ANSWER = "answer-to-this"  # stands for an answer where a template is tried
MORE = {"role": "user", "content": "question-after-it"}
WORDS = re.compile(r"<[^<>]*>|\[[^\[\]]*\]|\w+|[^\w\s]")  # of a template: marks such as <|user|> and [INST], and words
SCRIPTS = {"sft": "train_sft.py", "preference": "train_dpo.py", "unpaired": "train_dpo.py --loss kto"}


@dataclass
class Example:
    """One prompt with its k responses, as token ids."""

    where: str  # "prefs.jsonl:17", for error messages
    prompt: list[int]  # never empty; begins with BOS if the tokenizer adds one
    responses: list[list[int]]  # k lists, none empty; each ends in EOS unless it was truncated
    prompt_text: str  # as rendered; "" for `text` rows
    response_texts: list[str]
    ranks: list[int]  # 1 is best, equal is a tie
    labels: list[bool] | None = None  # unpaired rows: desirable or not
    trained: list[list[bool]] | None = None  # of responses with several turns: which tokens are trained; None: all
    margin: float | None = None  # by how much the first response is better, if the row gives it
    probability: float = 1.0  # P(the first response is preferred)
    row: dict = field(default_factory=dict)
    rewards: list[float] | None = None  # ranked by a simulated annotator: the true rewards of the responses
    noise: float | None = None  # ranked by a simulated annotator: the scale of the noise on those rewards
    sampled_logps: list[list[float]] | None = None  # of sampled responses: each token's log-prob in nats when drawn

    @property
    def lengths(self) -> list[int]:
        """The length of each response: its trained tokens."""
        return [*map(sum, self.trained)] if self.trained else [*map(len, self.responses)]

    def label_probability(self, better: int, worse: int) -> float:
        """P(the annotator labels `better` as preferred to `worse`): sigmoid((r_better - r_worse) / noise) if the
        rewards are known and the noise is above 0, else `probability`."""
        if self.rewards is None or not self.noise:
            return self.probability
        return (1 + math.tanh((self.rewards[better] - self.rewards[worse]) / self.noise / 2)) / 2


@dataclass
class Report:
    """Statistics of the data; `str(report)` is printed before training. Lengths are in tokens and include EOS."""

    rows: int = 0
    kept: int = 0
    prompts_cut: int = 0
    responses_cut: int = 0
    prompt_columns: Counter[str] = field(default_factory=Counter)  # column read as the prompt -> rows
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> rows
    skipped: list[str] = field(default_factory=list)  # bad rows under --skip-bad-rows, one message each
    unused: set[str] = field(default_factory=set)  # columns that do not reach the model
    sharegpt: int = 0  # rows with messages {"from", "value"}
    asked: int = 0  # rows whose prompt is a text and was made a user's message
    untemplated: int = 0  # other rows of strings under a tokenizer with a chat template
    hh_template: int = 0  # rows of messages under a tokenizer without one
    repeats: int = 0  # rows of strings with a response that begins with the prompt
    joined: int = 0  # rows of strings without whitespace between prompt and response
    dialogues: int = 0  # rows of a response with several turns
    against_scores: Counter[str] = field(default_factory=Counter)  # what does not support the preference -> examples
    bos: int = 0  # prompts that begin with exactly one BOS
    eos: int = 0  # responses that end in EOS
    sampled: int = 0  # responses whose ids are the row's `token_ids`
    foreign: int = 0  # responses whose `token_ids` are those of another tokenizer, and not used
    unknown: float = 0.0  # fraction of all tokens that are the tokenizer's UNK; in [0, 1]
    prompt_lengths: list[int] = field(default_factory=list)
    response_lengths: list[int] = field(default_factory=list)
    trained_tokens: int = 0  # of all responses; others stand between their trained turns
    length_difference: float | None = None  # mean of chosen - rejected over the pairs; tokens
    longer_wins: float | None = None  # accuracy of "the longer response is better", ties count half; in [0, 1]
    desirable: float | None = None  # fraction of the labels; in [0, 1]

    def __str__(self) -> str:
        out = [f"examples   {self.kept} of {self.rows} rows"]
        if self.dropped:
            out.append("dropped    " + ", ".join(f"{n} {reason}" for reason, n in sorted(self.dropped.items())))
        if self.skipped:
            out.append(f"skipped    {len(self.skipped)} bad rows, the first of them:")
            out += [f"             {message}" for message in self.skipped[:3]]
        if not self.kept:
            return "\n".join(out)
        prompts, responses = self.prompt_lengths, self.response_lengths
        if self.unused:
            names = ", ".join(repr(name[:40]) for name in sorted(map(str, self.unused))[:20])
            out.append(f"unused     columns that the model does not see: {names}{', ...' * (len(self.unused) > 20)}")
        for name, n in self.prompt_columns.items():
            out.append(f"prompt     the column {name!r} of {n} rows, which have no 'prompt'")
        if self.sharegpt:
            out.append(f"messages   of {self.sharegpt} rows have from and value in place of role and content")
        if self.asked:
            out.append(f"template   the prompts of {self.asked} rows are texts, and are read as a user's message")
        if self.untemplated:
            out.append(f"template   {self.untemplated} rows are strings, used without the tokenizer's chat template")
        if self.hh_template:
            form = "'\\n\\nHuman: ...\\n\\nAssistant: ...'"
            out.append(f"template   the tokenizer has none: {self.hh_template} rows of messages are written as {form}")
        if self.repeats:
            out.append(f"repeats    responses of {self.repeats} rows begin with their prompt, which is then read twice")
        if self.joined:
            out.append(f"joined     in {self.joined} rows of strings, prompt and response have no space between them")
        if self.dialogues:
            out.append(
                f"turns      responses of {self.dialogues} rows have several: the assistant's are trained, from where "
                "the responses differ on"
            )
        for problem, n in self.against_scores.items():
            out.append(f"scores     {problem} in {n} rows, but chosen is preferred")
        out.append(f"cut        {self.prompts_cut} prompts, {self.responses_cut} responses")
        out.append(f"BOS        one in front of {self.bos} of {len(prompts)} prompts")
        out.append(f"prompts    {sum(prompts) / len(prompts):.1f} tokens on average, {max(prompts)} at most")
        if responses:
            out.append(f"EOS        at the end of {self.eos} of {len(responses)} responses")
            trained = self.trained_tokens / len(responses)
            some = f", {trained:.1f} of them trained" if self.trained_tokens < sum(responses) else ""
            out.append(
                f"responses  {sum(responses) / len(responses):.1f} tokens on average{some}, {max(responses)} at most"
            )
        if self.sampled:
            out.append(f"token ids  of {self.sampled} responses are those that were sampled")
        if self.foreign:
            out.append(
                f"token ids  of {self.foreign} responses are another tokenizer's: their texts are tokenised anew"
            )
        if self.unknown:
            out.append(f"unknown    {self.unknown:.1%} of the tokens: the tokenizer does not know their text")
        if self.desirable is not None:
            out.append(f"labels     {self.desirable:.1%} desirable")
        if self.longer_wins is not None:
            out.append(f"lengths    chosen - rejected = {self.length_difference:+.1f} tokens on average")
            out.append(f"baseline   'the longer one is better' is right in {self.longer_wins:.1%} of the pairs")
        return "\n".join(out)


# ---------------------------------------------------------------------------------------- rendering a row


@dataclass
class _Draft:
    """A row as text. A response is a list of pieces (text, trained), each tokenised separately."""

    where: str
    row: dict
    prompt: str
    responses: list[list[tuple[str, bool]]]
    ranks: list[int]
    labels: list[bool] | None = None
    ended: list[bool] | None = None  # None: all
    token_ids: list[list[int]] | None = None  # of the responses, as they were sampled
    margin: float | None = None
    probability: float = 1.0
    rewards: list[float] | None = None
    noise: float | None = None
    rendered: bool = False  # by a chat template; else the strings of the row


def _render(tokenizer, messages: list[Message], tools: list[dict] | None, generate: bool = False) -> str:
    """Render messages as one text; with `generate`, the text ends at the point where the assistant's answer starts."""
    template = None if tokenizer.chat_template else HH_TEMPLATE  # None: the tokenizer's own
    options = {"tools": tools, "chat_template": template, "add_generation_prompt": generate}
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, **options)
    except Exception as error:  # a template is a program and may raise anything
        raise BadInput(f"the chat template refuses the messages ({one_line(error)}): mend them") from error


def _require_used(
    tokenizer, messages: list[Message], tools: list[dict] | None, generate: bool, prompt: str = ""
) -> None:
    """BadInput if the text is the same without the tools, without a field that a message has beside role and content,
    or with other content in a message that is not the assistant's: the chat template would drop it. BadInput also if
    the template writes the JSON of a call's arguments as a JSON string, with its quotes escaped. `prompt` is the
    rendered prompt, if it is known."""
    others: list[tuple] = [("'tools'", messages, None)] if tools else []
    for i, message in enumerate(messages):  # one at a time: a field of one message may be used, and another's dropped
        for name in fields_of(message):
            without = {k: v for k, v in message.items() if k != name}
            others.append((f"{name[:40]!r} of message {i + 1}", [*messages[:i], without, *messages[i + 1 :]], tools))
    lacks = lambda text, m: m["role"] != "assistant" and m["content"].strip() not in text  # noqa: E731
    if not others and not any(lacks(prompt, message) for message in messages):
        return
    text = check_text(_render(tokenizer, messages, tools, generate), "messages")
    for i, message in enumerate(messages):
        if lacks(text, message):  # unless the template writes it in another form
            changed = message | {"content": ANSWER}
            others.append((f"the {message['role']} message", [*messages[:i], changed, *messages[i + 1 :]], tools))
    for arguments in json_arguments(messages):
        if json.dumps(arguments, ensure_ascii=False) in text:
            problem = "the chat template writes the arguments of a tool call, which are a text, as a JSON string"
            raise BadInput(f"{problem}: give the object that the text holds (json.loads)")
    for name, *other in others:
        try:
            same = _render(tokenizer, *other, generate) == text
        except BadInput:  # the template needs it
            continue
        if same:
            raise BadInput(f"the chat template does not use {name}: leave it out, or use a model whose template does")


def _require_whole(answer: Message, text: str) -> None:
    """BadInput unless the rendered text has the whole answer, whatever its whitespace."""
    if "".join(answer["content"].split()) not in "".join(text.split()):
        raise BadInput(
            "the chat template leaves out a part of the answer, such as its thoughts or the text beside a tool call: "
            "give the row as strings"
        )


def _until_eos(tokenizer, text: str) -> str:
    """Without the whitespace after its last EOS, if it ends in one."""
    if tokenizer.eos_token:
        head, eos, tail = text.rpartition(tokenizer.eos_token)
        if eos and not tail.strip():
            return head + eos
    return text


def _turn(tokenizer, messages: list[Message], before: str, tools: list[dict] | None) -> str:
    """The text that the last message adds after `before`, up to its EOS if the template emits one."""
    text = _render(tokenizer, messages, tools)
    if not text.startswith(before):
        raise BadInput("the chat template does not begin a conversation with its prompt: give the row as strings")
    return _until_eos(tokenizer, text[len(before) :])


def _closing(tokenizer, prompt: list[Message], tools: list[dict] | None) -> str:
    """The text that the template writes after an answer to `prompt`, up to its EOS. BadInput if it opens another turn
    there, be it the user's or the assistant's."""
    answered = [*prompt, {"role": "assistant", "content": ANSWER}]
    before, found, last = _render(tokenizer, answered, tools).rpartition(ANSWER)
    if not found:
        raise BadInput("the chat template leaves out or rewrites an answer: give the row as strings")
    if _opens_turn(tokenizer, answered, tools, before, last):
        raise BadInput(
            f"the chat template opens another turn after an answer ({last[-60:]!r}): mend it to do so for "
            "add_generation_prompt only, or give the row as strings"
        )
    return _until_eos(tokenizer, last)


def _opens_turn(tokenizer, answered: list[Message], tools: list[dict] | None, before: str, last: str) -> bool:
    """Whether `last`, the text after the last answer, opens another turn. Then there is text behind EOS; or it is not
    what stands there when a user turn follows (which may be without EOS); or, if it has no EOS, it is all that stands
    in front of the text of this user turn, although the template marks what users say."""
    eos, closing = tokenizer.eos_token or "", _until_eos(tokenizer, last)
    if eos and eos in closing:
        if not closing.endswith(eos):
            return True
        mark, closing = "", closing.removesuffix(eos)
    else:
        try:
            mark = _render(tokenizer, [MORE], None).partition(MORE["content"])[0]
        except BadInput:
            mark = ""
        mark = mark.removeprefix(tokenizer.bos_token or "").strip()
    try:
        _, found, inner = _render(tokenizer, [*answered, MORE], tools).rpartition(ANSWER)
    except BadInput:  # a template of one turn only: a turn that it opens has the mark of a user or of an assistant
        ends = [WORDS.findall(text)[-1:] for text in (mark, before)]
        return closing == last and WORDS.findall(last)[-1:] in filter(None, ends)
    if not found:
        return False
    gap, found, _ = inner.partition(MORE["content"])
    return (
        not inner.startswith((last, closing)) or bool(mark and found and last.strip()) and gap.strip() == last.strip()
    )


def _conversation(tokenizer, messages: list[Message], tools: list[dict] | None) -> tuple[str, list[tuple[str, bool]]]:
    """The text before the first assistant turn, and the pieces from there to the last one."""
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not turns:
        raise BadInput("field 'messages' has no assistant message: give it one to train on")
    prompt = _render(tokenizer, check_prompt(messages[: turns[0]], "messages"), tools, generate=True)
    _closing(tokenizer, messages[: turns[0]], tools)
    return prompt, _pieces(tokenizer, messages, turns[0], turns[0], prompt, tools)


def _pieces(
    tokenizer, messages: list[Message], start: int, fork: int, text: str, tools: list[dict] | None
) -> list[tuple[str, bool]]:
    """The pieces of messages[start:], up to the last assistant turn, behind `text`, which is all before them. The
    assistant's turns are trained, from messages[fork] on."""
    pieces: list[tuple[str, bool]] = []
    for i in range(start, len(messages)):
        if messages[i]["role"] != "assistant":
            continue
        before = _render(tokenizer, messages[:i], tools, generate=True)
        if not before.startswith(text):
            raise BadInput("the chat template rewrites earlier turns: give rows of one answer to a prompt instead")
        if len(before) > len(text):
            pieces.append((before[len(text) :], False))
        answer = _turn(tokenizer, messages[: i + 1], before, tools)
        if i >= fork:
            _require_whole(messages[i], before + answer)
        pieces.append((answer, i >= fork))
        text = before + answer
    return pieces


def _sampled_ids(draft: _Draft, values: list, pieces: tokens.Pieces) -> list[list[int]] | None:
    """The field `token_ids`, checked: the tokenizer has them, and they spell the responses."""
    valid = lambda x: isinstance(x, list) and x and all(type(i) is int and 0 <= i < size for i in x)  # noqa: E731
    size = len(pieces.tokenizer)
    ids = optional_list(draft.row, "token_ids", valid, "lists of token ids")
    for i, value in enumerate(values):
        if not isinstance(value, str) and (fields := fields_of(value[-1])):
            raise BadInput(f"field 'responses[{i}]' has {fields[0][:40]!r}, and 'token_ids' spell texts: leave one out")
        if not pieces.spells(ids[i], value if isinstance(value, str) else content_text(value[-1]["content"])):
            raise BadInput(
                f"field 'token_ids[{i}]' does not spell 'responses[{i}]': leave token_ids out, or mend the text"
            )
    return ids


def _read_ranking(draft: _Draft, row: dict, has_ranks: bool) -> list:
    """The responses of a ranking row. Their ranks, and the optional columns, go into the draft."""
    values = row["responses"]
    ranks = row["ranks"] if has_ranks else [1] * (len(values) if isinstance(values, list) else 0)
    if not isinstance(values, list) or not isinstance(ranks, list) or not values:
        raise BadInput("fields 'responses' and 'ranks' are not two lists: give one rank for each response")
    if len(values) != len(ranks):
        raise BadInput(f"field 'ranks' has {len(ranks)} ranks for {len(values)} responses: give one for each")
    if not all(isinstance(rank, int | float) and 1 <= rank <= 1e9 and rank == rank // 1 for rank in ranks):
        raise BadInput("field 'ranks' is not made of whole numbers from 1 (best) to 10^9: rank the responses")
    draft.ranks = [int(rank) for rank in ranks]
    draft.ended = optional_list(row, "ended", lambda x: isinstance(x, bool), "true or false")
    is_finite = lambda x: isinstance(x, int | float) and not isinstance(x, bool) and abs(x) <= 1e30  # noqa: E731
    rewards = optional_list(row, "rewards", is_finite, "finite numbers")
    draft.rewards = rewards and [float(x) for x in rewards]
    draft.noise = optional_number(row, "noise", 0.0, 1e30)
    return values


def _answer(
    tokenizer, prompt: list[Message], answer: Message, name: str, ended: bool | None, before: str, tools, closing: str
) -> str:
    """The text of a single answer behind `before`, the rendered prompt. `ended`: whether a sampled answer reached its
    end; None for any other answer. A sampled answer is its own text, with `closing` if it ended."""
    fields = fields_of(answer)
    if ended is False:
        problem = f"field {name!r} was cut ('ended' is false) and has"
        require(not fields, f"{problem} {[*fields, ''][0][:40]!r}: write that into its content, as the model did")
        return answer["content"]
    turn = _turn(tokenizer, [*prompt, answer], before, tools)
    added = turn.removesuffix(closing).strip() != answer["content"].strip()
    if ended and added and not fields:  # what was not sampled, such as the end of a thought
        turn = answer["content"] + closing
    _require_whole(answer, before + turn)
    return turn


def _make_draft(where: str, row: dict, form: list[str], kind: str, pieces: tokens.Pieces, digest: str | None) -> _Draft:
    tokenizer = pieces.tokenizer
    row = row if form == ["text"] else standard(row)
    for name in form:
        if row.get(name) is None:
            raise BadInput(f"field {name!r} is {'null' if name in row else 'missing'}: give it to every row")
    cut = False in row["ended"] if isinstance(row.get("ended"), list) else row.get("ended") is False
    if cut and kind != "prompts" and "responses" not in form:
        raise BadInput(
            "field 'ended' goes with 'responses' and 'ranks': give a cut answer in such a row, or not at all"
        )
    if kind == "sft" and "chosen" not in form and row.get("label") is False:  # 0 may be one of many classes
        raise Dropped("undesirable completions")
    if row.get("ended") is None:
        for text in itertools.chain(*(x if isinstance(x, list) else [x] for x in map(row.get, form))):
            found = isinstance(text, str) and MESSAGES_TEXT.match(text)
            require(not found, f"a text is the JSON of messages ({str(text)[:40]!r}): give it as a list")
    if form == ["messages", "label"]:
        *before, answer = check_messages(row["messages"], "messages")
        require(
            answer["role"] == "assistant", "field 'messages' does not end in the answer that 'label' judges: add it"
        )
        row, form = row | {"prompt": before, "completion": [answer]}, KINDS["unpaired"][0]
    row = with_system(row, form)
    tools = tools_of(row)

    if form == ["text"]:
        require(not tools, STRINGS_AND_TOOLS)
        single = str(row.get("role")) in (*ROLES, *SPEAKERS, "prompter")
        require(not single, "fields 'text' and 'role' make the row a single message: join those of a dialogue")
        return _Draft(where, row, "", [[(check_text(row["text"], "text"), True)]], [1])
    if form == ["messages"]:
        messages = check_messages(row["messages"], "messages")
        if kind == "sft":
            _require_used(tokenizer, messages, tools, generate=False)
            prompt_text, pieces = _conversation(tokenizer, messages, tools)
            return _Draft(where, row, prompt_text, [pieces], [1], rendered=True)
        messages = check_prompt(messages[:-1] if messages[-1]["role"] == "assistant" else messages, "messages")
        _require_used(tokenizer, messages, tools, generate=True)
        return _Draft(where, row, _render(tokenizer, messages, tools, generate=True), [], [], rendered=True)

    draft = _Draft(where, row, "", [], [1])
    pair, shared = "chosen" in form, 0
    if pair and ("prompt" not in form or implicit(row)):
        prompt, values, shared = shared_beginning(row)
        names = ["chosen", "rejected"]
        if isinstance(prompt, str):
            draft.responses = [[(turn, i % 2 == 0 and i >= shared) for i, turn in enumerate(turns)] for turns in values]
            values = ["".join(turns) for turns in values]
    else:
        prompt = row["prompt"]
        if kind == "prompts" and isinstance(prompt, str):  # a user message if the answers are messages
            prompt = prompt_of(row)
        names = [name for name in form if name in ("completion", "chosen", "rejected")]
        values = [row[name] for name in names]
    if "responses" in form:
        values = _read_ranking(draft, row, "ranks" in form)
        names = [f"responses[{i}]" for i in range(len(values))]
    elif pair:
        draft.ranks = [1, 2]
        draft.margin = optional_number(row, "margin", -1e30, 1e30)
        probability = optional_number(row, "probability", 0.0, 1.0)
        draft.probability = 1.0 if probability is None else probability
        draft.labels = [True, False] if kind == "unpaired" else None
    elif "label" in form:
        if not isinstance(row["label"], int | float) or row["label"] not in (0, 1):
            raise BadInput("field 'label' is not true or false: say whether the completion is desirable")
        draft.labels = [bool(row["label"])]

    if kind == "prompts":
        values, names, draft.ranks = [], [], []
    elif len(values) > 1 and all(isinstance(x, list) and x for x in values) and any(len(x) > 1 for x in values):
        shared = shared_turns(values)
    if kind == "sft":
        values, names, draft.ranks, draft.margin, draft.probability = values[:1], names[:1], [1], None, 1.0

    if isinstance(prompt, str) and all(isinstance(value, str) for value in values):
        require(not tools, STRINGS_AND_TOOLS)
        draft.prompt = check_text(prompt, "prompt")
        texts = [check_text(x, name, draft.ended is not None) for x, name in zip(values, names, strict=True)]
        texts = texts if draft.ended else [_until_eos(tokenizer, text) for text in texts]
        draft.responses = draft.responses[: len(values)] or [[(text, True)] for text in texts]
    else:
        if isinstance(prompt, str):
            prompt = [{"role": "user", "content": check_text(prompt, "prompt")}]
        prompt = check_messages(prompt, "prompt")
        draft.prompt, draft.rendered = _render(tokenizer, check_prompt(prompt, "prompt"), tools, generate=True), True
        if kind == "prompts":
            _require_used(tokenizer, prompt, tools, generate=True, prompt=draft.prompt)
        closing = _closing(tokenizer, prompt, tools) if values else ""
        for i, (value, name) in enumerate(zip(values, names, strict=True)):
            turns = check_response(value, name, draft.ended is not None)
            _require_used(tokenizer, [*prompt, *turns], tools, generate=False, prompt=draft.prompt)
            if len(turns) > 1:
                fork = len(prompt) + shared
                draft.responses.append(_pieces(tokenizer, prompt + turns, len(prompt), fork, draft.prompt, tools))
            else:
                ended = draft.ended[i] if draft.ended else None
                turn = _answer(tokenizer, prompt, turns[0], name, ended, draft.prompt, tools, closing)
                draft.responses.append([(turn, True)])
    if "responses" in form and row.get("token_ids") is not None and row.get("tokenizer") == digest:
        draft.token_ids = _sampled_ids(draft, values, pieces)
    if "ranks" in form and len(set(draft.ranks)) == 1:
        raise Dropped("ties throughout")
    return draft


# ------------------------------------------------------------------------------------------------ token ids


def load(source: str | Sequence[str], kind: str, tokenizer, a: Any, chat: bool = False) -> list[Example]:
    """Read one or several sources, turn their rows into examples, and print the data report. A tokenizer without a chat
    template gets HH_TEMPLATE if it was used.

    `kind` is one of KINDS, or "preference or prompts" to let the columns decide. `a`: the flags of a script (split,
    skip_bad_rows, max_prompt_length, and max_length or max_new_tokens). `chat` is that of `build`.
    """
    alone = "reviews" not in sources(source) or source == "reviews"
    require(alone, "reviews is the embedded task, which does not mix with other data: give it alone, or not at all")
    limits = a.max_prompt_length, getattr(a, "max_length", a.max_prompt_length + a.max_new_tokens)
    gc.disable()  # reading rows makes no garbage, and looking for it takes a quarter of the time
    try:
        if source == "reviews":
            rows, skipped = reviews.rows(kind if kind in ("sft", "prompts") else "preference", reviews.ROWS), []
        else:
            rows, skipped = read_rows(source, a.split, a.skip_bad_rows)
        if kind == "preference or prompts":
            kind = "preference" if any("rejected" in row or "ranks" in row for _, row in rows) else "prompts"
        examples, report = build(rows, tokenizer, kind, *limits, a.skip_bad_rows, skipped, chat)
    finally:
        gc.enable()
    print(f"{' '.join(sources(source))}\n{report}\n")
    if report.hh_template:
        tokenizer.chat_template = HH_TEMPLATE
    return examples


def split_of(source: str | Sequence[str], split: str | None) -> str | None:
    """The split to read from other sources than --data: that of --data, unless all of them are files."""
    return None if all(Path(x).expanduser().is_file() for x in sources(source)) else split


def load_split(kind: str, tokenizer, a: Any, split_by: str | None = None) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples: --data and --eval-data, or a split of --data if --eval-data is not given.
    Prints how many held-out prompts are also in training. Raises BadInput if no training example is left."""
    require(bool(a.eval_data) or not a.eval_split, f"--eval-split {a.eval_split}: of which data? give --eval-data too")
    train = load(a.data, kind, tokenizer, a)
    if a.eval_data:
        split = a.eval_split or split_of(a.eval_data, a.split)
        held = load(a.eval_data, kind, tokenizer, replace(a, split=split))
    else:
        train, held = held_out(train, a.eval_fraction, split_by)
    require(bool(train), "--data: no example is left to train on")
    if a.eval_fraction and not held:
        print(f"no row is held out: --eval-fraction {a.eval_fraction:g} of {len(train)} rows left none\n")
    prompts = {group_of(example) for example in held}
    if n := len(prompts & {group_of(example) for example in train}):
        print(f"{n} of {len(prompts)} held-out prompts are also in training\n")
    most = getattr(a, "eval_pairs", None)
    if most is not None and len(held) > most:
        print(f"{most} of {len(held)} held-out rows are scored, chosen by hash (--eval-pairs)\n")
        held = some(held, most)
    return train, held


def some(examples: Sequence[Example], n: int) -> list[Example]:
    """At most n of the examples, in their order: those whose texts have the smallest hashes, so that they depend
    neither on the order nor on a seed, and fewer are a part of more."""

    def position(i: int) -> bytes:
        return hashlib.sha256(repr((examples[i].prompt_text, examples[i].response_texts)).encode("utf-8")).digest()

    return [examples[i] for i in sorted(sorted(range(len(examples)), key=position)[:n])]


def build(
    rows: Sequence[Row],
    tokenizer,
    kind: str,
    max_prompt_length: int,
    max_length: int,
    skip_bad_rows: bool = False,
    skipped: Sequence[str] = (),
    chat: bool = False,
) -> tuple[list[Example], Report]:
    """Examples of one of KINDS, and the data report.

    A prompt is truncated on the left to `max_prompt_length` tokens and keeps its BOS. A response is truncated on the
    right so that prompt and response have at most `max_length` tokens; it then has no EOS. `skipped`: the messages of
    `read_rows`, for the report. A malformed row raises BadInput; with `skip_bad_rows` it is left out and counted.

    With `chat`, a prompt that is a text is the message of a user if there is a chat template. Without, this holds for
    rows with a column `system` if it is filled in some of them.
    """
    rows, as_written = [(where, from_sharegpt(row)) for where, row in rows], rows
    form = _choose_form(rows, kind)
    if tokenizer.eos_token_id is None and form != ["text"] and kind != "prompts":
        raise BadInput("the tokenizer has no EOS token, so that no response could end: set its eos_token")
    report = Report(rows=len(rows) + len(skipped), skipped=list(skipped))
    report.sharegpt = sum(row is not other for (_, row), (_, other) in zip(rows, as_written, strict=True))
    chat = chat and bool(tokenizer.chat_template)
    systems = "prompt" in form and tokenizer.chat_template and any(row.get("system") not in EMPTY for _, row in rows)
    asked = [asked_by_user(row) if chat or systems and "system" in row else row for _, row in rows]
    report.asked = sum(row is not other for (_, row), other in zip(rows, asked, strict=True))
    rows = [(where, row) for (where, _), row in zip(rows, asked, strict=True)]
    used = {*form, "system", "tools", "where"}
    if "prompt" in form:
        other = [(names[0], row) for _, row in rows if len(names := prompt_columns(row)) == 1]
        report.prompt_columns.update(name for name, row in other if not implicit(row | {"prompt": row[name]}))
        used.update(name for name, _ in other)
    if kind == "prompts":  # the answers are not meant to be used
        used.update(OF_ANSWERS, ANNOTATIONS, *SCORES)
    elif "responses" in form:
        used.update(OF_RANKINGS)
    elif "chosen" in form:
        used.update(OF_PAIRS.get(kind, ()), *SCORES)
    for _, row in rows:
        ours = ANNOTATIONS if "responses" in form and row.get("annotator") else ()
        report.unused.update(name for name, value in row.items() if value not in EMPTY and name not in {*used, *ours})

    def attempt(where: str, step: Callable, *args):
        try:
            return step(*args)
        except Dropped as reason:
            report.dropped[str(reason)] += 1
        except BadInput as error:
            if not skip_bad_rows:
                raise BadInput(f"{where}: {error} or use --skip-bad-rows") from error
            report.skipped.append(f"{where}: {error}")

    pieces = tokens.Pieces(tokenizer)
    digest = tokens.digest(tokenizer) if any(row.get("token_ids") for _, row in rows) else None
    drafts = [attempt(where, _make_draft, where, row, form, kind, pieces, digest) for where, row in rows]
    drafts = [*filter(None, drafts)]
    rendered = sum(draft.rendered for draft in drafts)
    if tokenizer.chat_template:
        report.untemplated = len(drafts) - rendered
    else:
        report.hh_template = rendered
    if form not in (["messages"], ["text"]):
        report.dialogues = sum(any(len(pieces) > 1 for pieces in draft.responses) for draft in drafts)
    of_strings = [draft for draft in drafts if not draft.rendered]
    report.repeats = sum(map(_repeats_prompt, of_strings))
    if tokenizer.tokenize("a") != tokenizer.tokenize(" a"):  # else it sees words only, and no spaces
        report.joined = sum(any(_joined(draft.prompt, r[0][0]) for r in draft.responses) for draft in of_strings)
    texts = {piece for draft in drafts for response in _in_context(draft, pieces) for piece in response}
    ids = pieces.encode({("", ""), *texts, *(("", draft.prompt) for draft in drafts)})

    bos = tokenizer.bos_token_id if tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id] else None
    limits = min(max_prompt_length, max_length - 1), max_length
    examples = [attempt(draft.where, _make_example, draft, ids, pieces, bos, *limits, report) for draft in drafts]
    examples = [example for example in examples if example is not None]
    if not examples:
        reasons = [f"{n} {reason}" for reason, n in report.dropped.items()] + report.skipped[:1]
        name = rows[0][0].rpartition(":")[0]
        raise BadInput(f"{name}: nothing is left of its {len(rows)} rows ({'; '.join(reasons)}): give other data")
    _fill_report(report, examples, tokenizer)
    if "chosen" in form and kind != "prompts":
        _compare_scores(report, examples)
    return examples, report


def _choose_form(rows: Sequence[Row], kind: str) -> list[str]:
    """The first row form that at least one row matches. All rows must then have its columns."""
    if not rows:
        raise BadInput("the data holds no rows: give it some")
    filled, with_prompt = set(), set()
    for _, row in rows:
        names = frozenset(name for name, value in row.items() if value is not None)
        filled.add(names)
        if kind == "prompts" and in_messages(row):
            names -= {"prompt"}
        with_prompt.add(names | {"prompt"} if prompt_columns(row) else names)
    for form in KINDS[kind]:
        if any(names.issuperset(form) for names in with_prompt):
            return form
    for form in KINDS[kind]:
        for where, row in rows:
            lacking = [name for name in form if row.get(name) is None and (name != "prompt" or not prompt_columns(row))]
            require(not row.keys() >= {*lacking}, f"{where}: field {lacking[0]!r} is null: give it to every row")
    columns = ", ".join(repr(str(name)[:40]) for name in sorted(set().union(*filled), key=str)[:20]) or "none"
    needed = " | ".join(", ".join(form) for form in KINDS[kind])
    name = rows[0][0].rpartition(":")[0]
    others = [k for k in ("preference", "unpaired", "sft") if any(n.issuperset(f) for n in filled for f in KINDS[k])]
    hint = f"use {SCRIPTS[others[0]]}, or rename" if others else "rename"
    raise BadInput(
        f"{name}: its columns ({columns}) fit no form of {kind} rows: {hint} them to one of {needed}, or convert the "
        "data: docs/data.md has code for known sets"
    )


def _in_context(draft: _Draft, pieces: tokens.Pieces) -> list[list[tuple[str, str]]]:
    """The pieces of each response, each behind the context that decides its ids."""
    responses = []
    for texts in draft.responses:
        befores = itertools.accumulate((text for text, _ in texts), initial=draft.prompt)
        responses.append([(pieces.context(before), text) for before, (text, _) in zip(befores, texts, strict=False)])
    return responses


def _make_example(
    draft: _Draft,
    ids: dict[tuple[str, str], list[int]],
    pieces: tokens.Pieces,
    bos: int | None,
    max_prompt_length: int,
    max_length: int,
    report: Report,
) -> Example:
    """Look up the ids of prompt and responses, add BOS and EOS, and truncate to the two lengths."""
    tokenizer = pieces.tokenizer
    eos = tokenizer.eos_token_id
    responses, trained = [], []
    in_context, ends_of = _in_context(draft, pieces), draft.ended or [True] * len(draft.responses)
    for texts, keys, ended in zip(draft.responses, in_context, ends_of, strict=True):
        response: list[int] = []
        mask: list[bool] = []
        for i, ((text, train), key) in enumerate(zip(texts, keys, strict=True)):
            piece = list(ids[key])
            if train and not piece and draft.ended is None:
                raise BadInput(f"a response has no token in this tokenizer ({text[:40]!r}): give it another text")
            ends = i == len(texts) - 1 or not draft.rendered
            ends = ends or (tokenizer.chat_template or HH_TEMPLATE) == HH_TEMPLATE
            if train and ends and ended and eos is not None and piece[-1:] != [eos]:
                piece.append(eos)
            response += piece
            mask += [train] * len(piece)
        if draft.token_ids:
            response = draft.token_ids[len(responses)]
            mask = [True] * len(response)
        if not response:
            raise Dropped("a response without a token")
        responses.append(response)
        trained.append(mask)

    prompt = list(ids["", draft.prompt])
    if draft.prompt:
        if bos is not None and prompt[:1] != [bos]:
            prompt = [bos, *prompt]
        if not prompt:
            raise BadInput(f"the prompt has no token in this tokenizer ({draft.prompt[:40]!r}): give it another text")
    else:  # the prompt of a `text` row is BOS, else EOS, else the first token of the text, which is then not trained
        start = eos if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        prompt = [responses[0][0] if start is None else start]
        if responses[0][0] == prompt[0]:
            responses, trained = [responses[0][1:]], [trained[0][1:]]
        if not responses[0]:
            raise BadInput("field 'text' has one token only, and nothing to predict it from: give it a longer text")

    prompt_cut = len(prompt) > max_prompt_length
    if prompt_cut:
        head = [bos] if prompt[0] == bos else []
        prompt = head + prompt[len(prompt) - max_prompt_length + len(head) :]
    limit = max_length - len(prompt)
    truncated = [response[:limit] for response in responses]
    trained = [mask[:limit] for mask in trained]
    if len(set(draft.ranks)) > 1 and all(response == truncated[0] for response in truncated):
        raise Dropped("identical responses")
    if not all(map(any, trained)):
        raise Dropped("responses cut before their first trained token")
    report.prompts_cut += prompt_cut
    report.responses_cut += sum(len(response) > limit for response in responses)
    if draft.token_ids:
        report.sampled += len(responses)
    elif draft.responses and "responses" in draft.row and draft.row.get("token_ids"):
        report.foreign += len(responses)
    return Example(
        where=draft.where,
        prompt=prompt,
        responses=truncated,
        prompt_text=draft.prompt,
        response_texts=["".join(text for text, _ in texts) for texts in draft.responses],
        ranks=draft.ranks,
        labels=draft.labels,
        trained=None if all(map(all, trained)) else trained,
        margin=draft.margin,
        probability=draft.probability,
        rewards=draft.rewards,
        noise=draft.noise,
        row=draft.row,
    )


def _repeats_prompt(draft: _Draft) -> bool:
    """Whether a response is the prompt and more, or all begin with it, perhaps after the mark of a dialogue. A single
    response that is the prompt and nothing else is just an answer."""

    def bare(text: str) -> str:
        return text.strip().removeprefix("Human:").lstrip()

    prompt = bare(draft.prompt)
    rests = [bare("".join(text for text, _ in pieces)) for pieces in draft.responses]
    if not prompt or not rests:
        return False
    begins = [  # and not with a longer word
        rest.startswith(prompt) and not (prompt[-1].isalnum() and rest[len(prompt) :][:1].isalnum()) for rest in rests
    ]
    return all(begins) or any(begin and rest != prompt for begin, rest in zip(begins, rests, strict=True))


def _joined(prompt: str, response: str) -> bool:
    """Whether two texts that follow each other have no whitespace between them. A prompt may be empty."""
    return bool(prompt and response) and not (prompt[-1].isspace() or response[0].isspace())


def _compare_scores(report: Report, examples: list[Example]) -> None:
    """Count pairs whose scores or margins say that the rejected response is better, or as good."""

    def number(value: object) -> float:  # a score may be a number as text
        try:
            return float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
        except (ValueError, OverflowError):
            return math.nan

    report.against_scores["'margin' is not above 0"] = sum(number(e.row.get("margin")) <= 0 for e in examples)
    for better, worse in SCORES:
        n = sum(number(e.row.get(better)) <= number(e.row.get(worse)) for e in examples)
        report.against_scores[f"{better!r} is not above {worse!r}"] = n
    report.against_scores = +report.against_scores  # those that are above 0


def _fill_report(report: Report, examples: list[Example], tokenizer) -> None:
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    responses = [response for example in examples for response in example.responses]
    report.kept = len(examples)
    report.bos = sum(example.prompt[0] == bos and example.prompt[1:2] != [bos] for example in examples)
    report.eos = sum(response[-1] == eos for response in responses)
    report.prompt_lengths = [len(example.prompt) for example in examples]
    report.response_lengths = [len(response) for response in responses]
    report.trained_tokens = sum(sum(example.lengths) for example in examples)
    if tokenizer.unk_token_id not in (None, bos, eos):
        rows = [*(example.prompt for example in examples), *responses]
        report.unknown = sum(ids.count(tokenizer.unk_token_id) for ids in rows) / sum(map(len, rows))
    labels = [label for example in examples for label in example.labels or ()]
    report.desirable = sum(labels) / len(labels) if labels else None

    differences, longer_wins = [], []  # of each pair: expectations under the label's probability
    for example in examples:
        for better, worse in better_pairs(example.ranks):
            difference = example.lengths[better] - example.lengths[worse]
            probability = example.label_probability(better, worse)
            differences.append((2 * probability - 1) * difference)
            correct = 0.5 + 0.5 * ((difference > 0) - (difference < 0))
            longer_wins.append(probability * correct + (1 - probability) * (1 - correct))
    if longer_wins:
        report.length_difference = sum(differences) / len(differences)
        report.longer_wins = sum(longer_wins) / len(longer_wins)


# ------------------------------------------------------------------------------------------ splitting, showing


def group_of(example: Example, column: str | None = None) -> str:
    """The key that a split keeps together: the text of the prompt, or the value of a column of the row."""
    if column is None:
        return example.prompt_text or example.response_texts[0]
    value = example.row
    for name in column.split("."):
        value = value.get(name) if isinstance(value, dict) else None
    if value is None:
        raise BadInput(f"{example.where}: field {column!r} is missing: name another column to split by")
    return str(value)


def held_out(
    examples: Sequence[Example], fraction: float, column: str | None = None
) -> tuple[list[Example], list[Example]]:
    """Training and held-out examples. An example is held out if sha256(prompt), as a number in [0, 1), is < `fraction`.

    The split depends only on the text, not on order or seed, so equal prompts stay together. For `text` rows the whole
    text is hashed. With `column` ("topic", or "meta.topic" if nested), the column's value is hashed instead.
    """
    parts: tuple[list[Example], list[Example]] = [], []
    for example in examples:
        text = group_of(example, column)
        position = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64
        parts[position < fraction].append(example)
    return parts


def probes(prompts: Sequence[Example], tokens: int, without: Collection[int] = ()) -> list[Example]:
    """The shortest and the longest prompt, each with two artificial responses of `tokens` tokens. They serve to choose
    the layout before anything is sampled. `without`: ids that the responses must not contain, such as the pad id."""
    extremes = [min(prompts, key=lambda e: len(e.prompt)), max(prompts, key=lambda e: len(e.prompt))]
    allowed = [token for token in extremes[1].prompt if token not in without] or [max(without) + 1]
    response = (allowed * tokens)[:tokens]
    return [replace(e, responses=[response, response[::-1]], ranks=[1, 1], trained=None) for e in extremes]


def show(example: Example, tokenizer) -> str:
    """The example token by token, as the vocabulary writes them, with `+` before each trained token and `.` before
    each other one."""

    def block(ids: list[int], trained: list[bool]) -> list[str]:
        lines = [""]
        for token, train in zip(ids, trained, strict=True):
            word = ("+" if train else ".") + repr(tokenizer.convert_ids_to_tokens(token))
            if len(lines[-1]) + len(word) > 110:
                lines.append("")
            lines[-1] += " " + word
        return ["   " + line for line in lines]

    prompt = example.prompt
    out = [f"{example.where}: prompt, {len(prompt)} tokens (+ trained, . not)", *block(prompt, [False] * len(prompt))]
    for i, ids in enumerate(example.responses):
        trained = example.trained[i] if example.trained else [True] * len(ids)
        label = f"rank {example.ranks[i]}"
        if example.labels is not None:
            label = "desirable" if example.labels[i] else "undesirable"
        out += [f"response {i + 1} ({label}), {len(ids)} tokens, {sum(trained)} trained", *block(ids, trained)]
    return "\n".join(out)
