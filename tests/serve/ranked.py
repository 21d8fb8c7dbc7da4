"""What each rank does in test_ranks.py: for some models in a folder, its logits and answers.

    MLX_RANK=... python -m tests.serve.ranked FOLDER MODEL[:KV] ...

Each rank writes FOLDER/rank-N.json. `logits` and `answers` are also what one process alone gives.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import optiq  # isort: skip (before mlx)
import mlx.core as mx
from mlx_lm.models.cache import make_prompt_cache

from optiq.distributed.ranks import World, world
from optiq.nn.blocks import Fused
from optiq.nn.shard import shard
from optiq.nn.stack import runs_as_one
from optiq.serve.engine.request import Request, Sampling
from optiq.serve.opening import Opened, Ranks, open_model, open_share
from optiq.serve.options import Options
from optiq.serve.ranks import Loss, follow
from optiq.sources import load, resolve
from tests.serve.cases import NEVER_ENDS, ask, ask_all, prompt

PROMPT = tuple(random.Random(7).randrange(3, 384) for _ in range(40))
OPTIONS = Options(max_concurrent=4, prefix_memory=1 << 24)


def asked() -> list[Request]:
    """One begins as another does, one repeats itself."""
    r = random.Random(3)
    greedy, drawn = Sampling(0.0, logit_bias=NEVER_ENDS), Sampling(seed=1, logit_bias=NEVER_ENDS)
    return [
        Request(PROMPT, 8, greedy, top_logprobs=0),
        Request(prompt(r, 12) * 4, 12, greedy, top_logprobs=0),
        Request((*PROMPT[:30], *prompt(r, 40)), 6, drawn, top_logprobs=0),
    ]


def answers(opened: Opened) -> list[Any]:
    """Of all requests beside each other, and of the first one again, from the prefix cache."""
    engine: Any = opened.engine
    engine.start()
    try:
        given = [*ask_all(engine, asked()), ask(engine, asked()[0])]
    finally:
        engine.close()
    return [
        [each.ids, [token.logprob for token in each.tokens], each.last.cached_tokens]
        for each in given
    ]


def logits(folder: Path, ranks: World) -> Any:
    """Of a prompt, read in two slices, and of a token after it, by exact products."""
    model = load(resolve(str(folder)), allow_quantized=True).model
    shard(model, ranks, folder.name)
    optiq.accelerate(model)
    caches = make_prompt_cache(model)
    parts = [PROMPT[:25], PROMPT[25:], PROMPT[:1]]
    rows = [model(mx.array([part]), cache=caches)[0, -3:] for part in parts]
    return mx.concatenate(rows).astype(mx.float32).tolist()


def facts(sequences: Any) -> dict[str, Any]:
    """What tells whether a rank has its share alone, and how it computes."""
    return {
        "fused": sum(isinstance(block, Fused) for block in sequences.model.layers),
        "as one": runs_as_one(sequences.model),
        "kv": [size for size, _ in sequences._measured.windows],
        "drafts": sequences._measured.drafts,
    }


def main(folder: Path, cases: list[str]) -> None:
    found: dict[str, Any] = {}
    loss = Loss()
    with world(loss) as here:
        for case in cases:
            name, _, kv = case.partition(":")
            one: dict[str, Any] = {"logits": logits(folder / name, here)}
            if here.rank == 0:
                opened = open_model(folder / name, OPTIONS, kv=kv or None, ranks=Ranks(here, loss))
                engine: Any = opened.engine
                one |= facts(engine._sequences) | {"answers": answers(opened)}
            else:
                share = open_share(folder / name, OPTIONS, kv=kv or None, revision=None, world=here)
                follow(share)
                one |= facts(share)
            here.close()  # on rank 0, this is the end of what the others follow
            found[case] = one
    (folder / f"rank-{here.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
