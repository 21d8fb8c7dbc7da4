"""IFEval: does an answer follow the 25 kinds of verifiable instruction (Zhou et al. 2023)?

    validate(instruction_id_list, kwargs)          # once, when the data is read
    verdict = check(prompt, answer, instruction_id_list, kwargs)

Pure: no model; no files but what langdetect and punkt, the extra `optiq-mlx[evals]`, bring along.
"""

from .kinds import KINDS
from .verdict import Verdict, check, validate

__all__ = ["KINDS", "Verdict", "check", "validate"]
