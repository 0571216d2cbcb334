"""Prompt engineering by exact likelihood: templates, choices, demonstrations, search, votes, grammars.

```python
model = lm.load("smollm2-135m")
prompts.score_choices(model, ["The capital of France is"], [" Paris", " London"])[0].argmax()  # 0
```
"""

from jaxml.prompts import constrain, select
from jaxml.prompts.choices import CONTENT_FREE, calibrate, score_choices
from jaxml.prompts.endpoint import Endpoint, EndpointError
from jaxml.prompts.llm import LLM, Local, Reply, Scores
from jaxml.prompts.report import Report, bootstrap
from jaxml.prompts.search import orders, propose, search
from jaxml.prompts.store import Store
from jaxml.prompts.task import Candidate, Task
from jaxml.prompts.template import Template, after, chain_of_thought, few_shot, react, structured
from jaxml.prompts.vote import Votes, self_consistency

__all__ = [
    "CONTENT_FREE",
    "LLM",
    "Candidate",
    "Endpoint",
    "EndpointError",
    "Local",
    "Reply",
    "Report",
    "Scores",
    "Store",
    "Task",
    "Template",
    "Votes",
    "after",
    "bootstrap",
    "calibrate",
    "chain_of_thought",
    "constrain",
    "few_shot",
    "orders",
    "propose",
    "react",
    "score_choices",
    "search",
    "select",
    "self_consistency",
    "structured",
]
