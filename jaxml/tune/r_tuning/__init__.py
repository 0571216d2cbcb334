"""R-Tuning: a model that says when it does not know (Zhang et al. 2024), with the methods that repaired it.

```python
split = r_tuning.split(r_tuning.countries())
made = r_tuning.r_tune(model, split.train, tune)                       # asks, labels, trains
policy = r_tuning.calibrate(r_tuning.answer(made.model, split.calibration), risk=0.2)
r_tuning.answer_or_refuse(made.model, ["What is the capital of Zubrowka?"], policy)
```
"""

from jaxml.tune.r_tuning import ask, examples, form, items, job, judge, labels, metrics, policy, report, sources
from jaxml.tune.r_tuning.ask import Answered, Asker, answer, certainty
from jaxml.tune.r_tuning.form import GROUNDED, NUMBERS, PLAIN, REFUSALS, SURE, WORDS, Form, Scale
from jaxml.tune.r_tuning.items import Item, Split, read, split
from jaxml.tune.r_tuning.job import PUBLISHED, Made, Recipe, r_tune
from jaxml.tune.r_tuning.judge import right
from jaxml.tune.r_tuning.labels import Labels
from jaxml.tune.r_tuning.policy import Policy, Said, answer_or_refuse, calibrate, sure, threshold
from jaxml.tune.r_tuning.report import Method, compare, evaluate
from jaxml.tune.r_tuning.sources import countries, invented, pararel

__all__ = [
    "GROUNDED", "NUMBERS", "PLAIN", "PUBLISHED", "REFUSALS", "SURE", "WORDS", "Answered", "Asker", "Form", "Item",
    "Labels", "Made", "Method", "Policy", "Recipe", "Said", "Scale", "Split", "answer", "answer_or_refuse", "ask",
    "calibrate", "certainty", "compare", "countries", "evaluate", "examples", "form", "invented", "items", "job",
    "judge", "labels", "metrics", "pararel", "policy", "r_tune", "read", "report", "right", "sources", "split",
    "sure", "threshold",
]  # fmt: skip
