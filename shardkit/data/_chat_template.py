"""Chat templates as data: how a chat is written as text, by family.

A folder's own `chat_template` is a program, which is not run. A template here is the text around a
turn, and the marks that its tokenizer must have as single tokens.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from .._core.errors import DataError, did_you_mean
from ._json_lines import Turn

Spans = list[tuple[int, int]]


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """How the turns of a chat are written."""

    name: str  # as `data.template` says it
    start: str  # before the first turn
    before: Mapping[str, str]  # in front of a turn, by role; `{role}` is its name
    after: Mapping[str, str]  # behind a turn, by role, as far as the model writes it
    between: Mapping[str, str]  # behind that, by role
    # texts in it that must be single tokens, and that no message may contain
    marks: tuple[str, ...]
    strip: bool = False  # whether spaces around a message are dropped
    # what `{role}` is, where that is not the role itself
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def end(self) -> str:
        """What ends an answer."""
        return self.after["assistant"]

    def render(self, turns: Sequence[Turn]) -> tuple[str, Spans]:
        """Writes a chat: its text, and `[start, stop)` in characters of each answer with its mark.

        Raises ValueError if a role has no place in the template, or a message contains one of its
        marks.

        >>> chat = [Turn("user", "Hi"), Turn("assistant", "Hello")]
        >>> text, [(start, stop)] = TEMPLATES["chatml"].render(chat)
        >>> text[start:stop]
        'Hello<|im_end|>'
        """
        text, spans = self.start, list[tuple[int, int]]()
        for turn in turns:
            if turn.role not in self.before:
                raise ValueError(f"has a {turn.role} message, which template {self.name!r} lacks")
            if mark := next((mark for mark in self.marks if mark in turn.content), None):
                raise ValueError(f"has {mark!r} in a message, a mark of template {self.name!r}")
            text += self.before[turn.role].format(role=self.names.get(turn.role, turn.role))
            start = len(text)
            text += (turn.content.strip() if self.strip else turn.content) + self.after[turn.role]
            if turn.is_answer:
                spans.append((start, len(text)))
            text += self.between[turn.role]
        return text, spans

    def render_prompt(self, turns: Sequence[Turn]) -> str:
        """Writes the turns of a chat and the beginning of an answer."""
        name = self.names.get("assistant", "assistant")
        return self.render(turns)[0] + self.before["assistant"].format(role=name)


def _alike(text: str, *roles: str) -> dict[str, str]:
    return dict.fromkeys(roles, text)


_ALL = ("system", "user", "assistant")
TEMPLATES: Mapping[str, ChatTemplate] = {
    # Qwen2 and 3, SmolLM, many others; without the system message that Qwen2.5 adds.
    "chatml": ChatTemplate(
        name="chatml",
        start="",
        before=_alike("<|im_start|>{role}\n", *_ALL),
        after=_alike("<|im_end|>", *_ALL),
        between=_alike("\n", *_ALL),
        marks=("<|im_start|>", "<|im_end|>"),
    ),
    # Llama 3; without the dates that 3.1 adds to the system message.
    "llama3": ChatTemplate(
        name="llama3",
        start="<|begin_of_text|>",
        before=_alike("<|start_header_id|>{role}<|end_header_id|>\n\n", *_ALL),
        after=_alike("<|eot_id|>", *_ALL),
        between=_alike("", *_ALL),
        marks=("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        strip=True,
    ),
    # Gemma 2 and 3; no system message.
    "gemma": ChatTemplate(
        name="gemma",
        start="<bos>",
        before=_alike("<start_of_turn>{role}\n", "user", "assistant"),
        after=_alike("<end_of_turn>", "user", "assistant"),
        between=_alike("\n", "user", "assistant"),
        marks=("<bos>", "<start_of_turn>", "<end_of_turn>"),
        strip=True,
        names={"assistant": "model"},
    ),
    # Mistral 7B v0.3 and Mixtral 8x22B v0.3, whose [INST] is a token; no system message.
    "mistral": ChatTemplate(
        name="mistral",
        start="<s>",
        before={"user": "[INST] ", "assistant": " "},
        after={"user": "[/INST]", "assistant": "</s>"},
        between=_alike("", "user", "assistant"),
        marks=("<s>", "</s>", "[INST]", "[/INST]"),
    ),
    # For models and tokenizers without marks of their own.
    "plain": ChatTemplate(
        name="plain",
        start="",
        before=_alike("### {role}\n", *_ALL),
        after=_alike("\n\n", *_ALL),
        between=_alike("", *_ALL),
        marks=("### system\n", "### user\n", "### assistant\n"),
    ),
}
"""The known templates, by name. `plain` has no marks that are tokens."""

_MARKED = [template for template in TEMPLATES.values() if template.name != "plain"]


def choose_template(name: str | None, tokens: Mapping[str, int]) -> ChatTemplate:
    """Returns the template of a name; for None the one whose marks are in `{token: id}`.

    Raises DataError if there is no such template, its marks are no tokens, or not exactly one fits.
    """
    headline = "The chats have no template."
    if name is None:
        fitting = [t for t in _MARKED if all(mark in tokens for mark in t.marks)]
        if len(fitting) == 1:
            return fitting[0]
        known = ", ".join(t.name for t in fitting) or "none"
        why = f"is not set, and the tokenizer has the marks of {known} of {', '.join(TEMPLATES)}"
        raise DataError.of(headline, "data.template", why, _FIX)
    if name not in TEMPLATES:
        why = f"is not one of {', '.join(TEMPLATES)}.{did_you_mean(name, TEMPLATES)}"
        raise DataError.of(headline, f"data.template={name}", why, _FIX)
    template = TEMPLATES[name]
    missing = [mark for mark in template.marks if mark not in tokens]
    if missing and template in _MARKED:
        why = f"needs {', '.join(missing)} as tokens, and the tokenizer has none of that name"
        raise DataError.of(headline, f"data.template={name}", why, _FIX)
    return template


_FIX = "--set data.template=plain, or the tokenizer of the template's family"
