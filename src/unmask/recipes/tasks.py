"""What to learn and how it is judged: GLUE as in the paper's Table 7b, and the demo."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from unmask.errors import UnmaskError

__all__ = ["cola", "mnli", "mrpc", "qnli", "qqp", "rte", "sms_spam", "sst2", "stsb"]

Metric = Callable[[Any, Any], float]


@dataclass(frozen=True)
class Task:
    """A labelled text set: which columns to read, which metric counts, how long to train.

    labels       names of the classes in the order of their ids; none for regression
    validation   splits to measure on; the first one's metric is the run's
    eval_steps   measure every so many steps (None: only before and after training)
    """

    name: str
    text: tuple[str, ...]
    metric: str
    labels: tuple[str, ...] = ()
    label: str = "label"
    hub: tuple[str, ...] = ()
    train: str = "train"
    validation: tuple[str, ...] = ("validation",)
    epochs: float = 3
    max_length: int = 256
    eval_steps: int | None = None

    @property
    def regression(self) -> bool:
        """Whether the label is a number to predict, not a class."""
        return not self.labels

    def score(self, logits: Any, labels: Any) -> float:
        """The task's metric of a model's outputs, times one: 1.0 is perfect."""
        predicted = logits.reshape(-1) if self.regression else logits.argmax(-1)
        return METRICS[self.metric](labels, predicted)


def accuracy(labels: Any, predicted: Any) -> float:
    """Share of rows predicted right."""
    from sklearn.metrics import accuracy_score

    return float(accuracy_score(labels, predicted))


def matthews(labels: Any, predicted: Any) -> float:
    """Matthews correlation: 0 for anything that ignores the text, whatever the class balance."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predicted))


def pearson_spearman(labels: Any, predicted: Any) -> float:
    """Mean of Pearson's and Spearman's correlation; 0 if either side never varies."""
    from scipy.stats import pearsonr, spearmanr

    if min(len(set(map(float, side))) for side in (labels, predicted)) < 2:
        return 0.0
    pearson, spearman = pearsonr(labels, predicted)[0], spearmanr(labels, predicted)[0]
    return float(pearson + spearman) / 2


METRICS: dict[str, Metric] = {
    "accuracy": accuracy,
    "matthews": matthews,
    "pearson_spearman": pearson_spearman,
}

cola = Task(
    "cola",
    text=("sentence",),
    metric="matthews",
    labels=("unacceptable", "acceptable"),
    hub=("nyu-mll/glue", "cola"),
    epochs=20,
    eval_steps=200,
)
sst2 = Task(
    "sst2",
    text=("sentence",),
    metric="accuracy",
    labels=("negative", "positive"),
    hub=("nyu-mll/glue", "sst2"),
    epochs=7,
    eval_steps=500,
)
mrpc = Task(
    "mrpc",
    text=("sentence1", "sentence2"),
    metric="accuracy",
    labels=("not_equivalent", "equivalent"),
    hub=("nyu-mll/glue", "mrpc"),
    epochs=30,
    eval_steps=100,
)
stsb = Task(
    "stsb",
    text=("sentence1", "sentence2"),
    metric="pearson_spearman",
    hub=("nyu-mll/glue", "stsb"),
    epochs=15,
    eval_steps=200,
)
qqp = Task(
    "qqp",
    text=("question1", "question2"),
    metric="accuracy",
    labels=("not_duplicate", "duplicate"),
    hub=("nyu-mll/glue", "qqp"),
    eval_steps=4000,
)
mnli = Task(
    "mnli",
    text=("premise", "hypothesis"),
    metric="accuracy",
    labels=("entailment", "neutral", "contradiction"),
    hub=("nyu-mll/glue", "mnli"),
    validation=("validation_matched", "validation_mismatched"),
    eval_steps=4000,
)
qnli = Task(
    "qnli",
    text=("question", "sentence"),
    metric="accuracy",
    labels=("entailment", "not_entailment"),
    hub=("nyu-mll/glue", "qnli"),
    epochs=7,
    eval_steps=1000,
)
rte = Task(
    "rte",
    text=("sentence1", "sentence2"),
    metric="accuracy",
    labels=("entailment", "not_entailment"),
    hub=("nyu-mll/glue", "rte"),
    epochs=30,
    eval_steps=100,
)
sms_spam = Task(  # the embedded one, see demo.py
    "sms_spam",
    text=("message",),
    metric="matthews",
    labels=("ham", "spam"),
    epochs=1,
    max_length=64,
)


def named(name: str) -> Task:
    """The task of this name.

    >>> named("rte").epochs
    30
    """
    if name not in __all__:
        near = difflib.get_close_matches(name, __all__, 1)
        raise UnmaskError(
            f"no task is called {name!r}{f' (did you mean {near[0]!r}?)' if near else ''}; there "
            f"are {', '.join(__all__)}, and your own files with --train-file and --validation-file"
        )
    task: Task = globals()[name]
    return task
