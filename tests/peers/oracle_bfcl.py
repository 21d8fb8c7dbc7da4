"""bfcl-eval's checker and parser, run in an environment of its own by test_bfcl.py.

A line in is [function, possible_answer, "[{name: arguments}, ...]"], the last in Python syntax for
its tuples, or a text of calls; a line out is [valid, error_type], or the calls read. It is null
where bfcl-eval raises.
"""

from __future__ import annotations

import ast
import json
import sys
import types
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock


class Stub(Loader):
    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        module = types.ModuleType(spec.name)
        module.__getattr__ = lambda name: MagicMock()
        module.__all__ = []
        return module

    def exec_module(self, module: types.ModuleType) -> None: ...


class Stubs(MetaPathFinder):
    """In place of what asks models, or reads Java and JavaScript: a hundred more packages."""

    NAMES = (
        "bfcl_eval.constants.model_config",
        "bfcl_eval.constants.default_prompts",
        "bfcl_eval.eval_checker.ast_eval.type_convertor.",
        "bfcl_eval.model_handler.parser.",
        "bfcl_eval.utils",
        "tenacity",
    )

    def find_spec(self, name: str, path: object, target: object = None) -> ModuleSpec | None:
        return ModuleSpec(name, Stub()) if name.startswith(self.NAMES) else None


sys.meta_path.insert(0, Stubs())

from bfcl_eval.constants.enums import Language  # noqa: E402
from bfcl_eval.eval_checker.ast_eval import ast_checker  # noqa: E402
from bfcl_eval.model_handler.utils import default_decode_ast_prompting  # noqa: E402

PLAIN_NAMES = types.SimpleNamespace(underscore_to_dot=False)  # as every local model has it
ast_checker.MODEL_CONFIG_MAPPING = {"local": PLAIN_NAMES}


def answer(case: list | str) -> list | None:
    try:
        if isinstance(case, str):
            return default_decode_ast_prompting(case)
        function, possible_answer, calls = case
        result = ast_checker.ast_checker(
            [function],
            ast.literal_eval(calls),
            [possible_answer],
            Language.PYTHON,
            "simple_python",
            "local",
        )
        return [result["valid"], result.get("error_type")]
    except Exception:
        return None


for line in sys.stdin:
    print(json.dumps(answer(json.loads(line)), default=repr))
