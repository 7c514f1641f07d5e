"""Formulas become MathML when the site is built: no script runs in the reader's browser.

`pymdownx.arithmatex` marks them; here each is converted, and a command that isn't known fails the
build instead of showing as red text.
"""

import html
import re

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError

INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
BLOCK = re.compile(r'<div class="arithmatex">\s*\\\[(.*?)\\\]\s*</div>', re.DOTALL)


def on_page_content(content, page, **_):
    """Replace every marked formula of a page."""

    def mathml(found, display):
        formula = html.unescape(found[1]).strip()
        try:
            converted = convert(formula, display=display)
        except Exception as problem:
            raise PluginError(f"{page.file.src_path}: {problem!r} in {formula!r}") from problem
        if "\\" in converted:
            raise PluginError(f"{page.file.src_path}: unknown command in {formula!r}")
        return converted

    content = INLINE.sub(lambda found: mathml(found, "inline"), content)
    return BLOCK.sub(lambda found: mathml(found, "block"), content)
