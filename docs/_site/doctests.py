"""Shows the examples of docstrings as code: in Markdown, `>>>` is a quotation in a quotation."""

import re
from typing import Any

import griffe

# An example: lines from `>>>` to the next empty one, of the same indentation.
_EXAMPLE = re.compile(r"^( *)>>> .*(?:\n\1\S.*|\n\1 +\S.*)*", re.M)


class Doctests(griffe.Extension):
    """Puts a fence around each example, before a docstring is parsed."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring and "```" not in obj.docstring.value:
            obj.docstring.value = _EXAMPLE.sub(_fence, obj.docstring.value)


def _fence(example: re.Match[str]) -> str:
    indent = example[1]
    return f"{indent}```pycon\n{example[0]}\n{indent}```"
