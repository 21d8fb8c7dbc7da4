"""lm-eval's IFEval, run in an environment of its own by test_ifeval.py.

A line in is [instruction_id_list, kwargs, response] or a text; a line out is [strict, loose], or
the text's sentences and words by NLTK.
"""

from __future__ import annotations

import json
import logging
import sys
import types
from importlib.util import find_spec

# The packages without their __init__, which import all of lm-eval.
(path,) = find_spec("lm_eval").submodule_search_locations
for name, folder in (("lm_eval", path), ("lm_eval.tasks", f"{path}/tasks")):
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [folder]

import langdetect  # noqa: E402
import nltk  # noqa: E402
from lm_eval.tasks.ifeval import utils  # noqa: E402

langdetect.DetectorFactory.seed = 0
logging.disable()  # of texts in no language


def answer(case: list | str) -> list:
    if isinstance(case, str):
        return [nltk.sent_tokenize(case), nltk.word_tokenize(case)]
    ids, kwargs, response = case
    example = utils.InputExample(key=0, instruction_id_list=ids, prompt="", kwargs=kwargs)
    return [
        utils.test_instruction_following_strict(example, response).follow_instruction_list,
        utils.test_instruction_following_loose(example, response).follow_instruction_list,
    ]


for line in sys.stdin:
    print(json.dumps(answer(json.loads(line))))
