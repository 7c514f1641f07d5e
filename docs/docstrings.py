"""Docstrings are plain text that reads well in an editor; here they become Markdown.

A doctest becomes a code block, an aligned table of names and texts becomes a list, and characters
that Markdown would interpret outside of `code` are escaped.
"""

import re

import griffe

ALIGNED = re.compile(r"^(\S.*?) {2,}(?=\S)", re.MULTILINE)
SPECIAL = re.compile(r"(`[^`]*`)|([\\*_<>\[\]#])")


def markdown(paragraph):
    """One paragraph of a docstring as Markdown."""
    if paragraph.startswith(">>>"):
        return f"```pycon\n{paragraph}\n```"
    if ALIGNED.match(paragraph):
        return ALIGNED.sub(r"- `\1`: ", paragraph)
    return SPECIAL.sub(lambda found: found[1] or "\\" + found[2], paragraph)


class PlainText(griffe.Extension):
    """Rewrites every docstring that the page shows."""

    def on_instance(self, *, obj, **_):
        """Called for each module, class, function and attribute."""
        if obj.docstring:
            paragraphs = re.split(r"\n\s*\n", obj.docstring.value.strip())
            obj.docstring.value = "\n\n".join(markdown(paragraph) for paragraph in paragraphs)
