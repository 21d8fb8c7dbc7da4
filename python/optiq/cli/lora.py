"""`optiq lora train MODEL --data DIR -o ADAPTER`, and what is done with adapters."""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from . import options
from .tables import after, facts_lines

if TYPE_CHECKING:
    from ..lora.adapter import Adapter
    from ..lora.training import Result


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "Each action has options of its own, and --help and --json."
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    _add_train(actions.add_parser("train", help="train an adapter for a model"))
    info = actions.add_parser("info", help="what an adapter is")
    info.add_argument("adapter", help="a folder of ours, mlx-lm's or PEFT's")
    merge = actions.add_parser("merge", help="write a model with adapters in its weights")
    options.add_model(merge)
    _add_adapters(merge.add_argument_group(), "--adapter")
    merge.add_argument("--dense", action="store_true", help="weights that are not quantized")
    export = actions.add_parser("export", help="write adapters, several as one, for mlx-lm or PEFT")
    _add_adapters(export.add_argument_group(), "adapter")
    export.add_argument("--to", choices=("mlx", "peft"), required=True)
    for parser in (merge, export):
        parser.add_argument("-o", "--out", required=True, help="folder to write; must not exist")
    for parser in (info, merge, export):
        options.add_json(parser)


def _add_adapters(group: argparse._ArgumentGroup, name: str) -> None:
    how = {"required": True} if name.startswith("-") else {}
    group.add_argument(
        name,
        nargs="+",
        metavar="FOLDER[=WEIGHT]",
        help="an adapter, and by what it is multiplied; several are added up",
        **how,  # type: ignore[arg-type]
    )


def _add_train(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    parser.add_argument(
        "--data",
        required=True,
        metavar="DIR",
        help="a folder with train.jsonl and perhaps valid.jsonl, or one file; rows are messages "
        "(and tools), prompt and completion, or text",
    )
    parser.add_argument("-o", "--out", required=True, help="folder to write; must not exist")
    parser.add_argument("--iters", type=options.positive, default=200, help="updates")
    parser.add_argument(
        "--batch-size", type=options.positive, default=8, help="samples of an update"
    )
    parser.add_argument("--rank", type=options.positive, default=8, help="sets the budget")
    parser.add_argument(
        "--ranks",
        default="uniform",
        metavar="HOW",
        help="uniform, sensitivity, bits or a JSON file of ranks by layer, within the budget",
    )
    parser.add_argument(
        "--init",
        choices=("zero", "qera", "pissa"),
        help="how the matrices begin (default: qera with --original and without --dpo, else zero)",
    )
    parser.add_argument(
        "--original",
        metavar="MODEL",
        help="the model that MODEL was quantized from: for --init qera, and what quantization "
        "lost in --ranks sensitivity",
    )
    parser.add_argument("--scale", type=float, default=2.0, help="of the low-rank term")
    parser.add_argument("--targets", choices=("all", "attention", "mlp"), default="all")
    parser.add_argument(
        "--dpo",
        action="store_true",
        help="learn preferences; rows are prompt, chosen and rejected",
    )
    parser.add_argument("--beta", type=float, default=0.1, help="of --dpo (default: 0.1)")
    parser.add_argument("--lr", type=float, default=2e-4, help="the highest learning rate")
    parser.add_argument("--warmup", type=int, help="updates in which it rises (default: a 20th)")
    parser.add_argument("--weight-decay", type=float, default=0.01)
    parser.add_argument("--clip", type=float, default=1.0, help="largest norm of the gradient")
    parser.add_argument("--max-length", type=options.positive, default=2048, metavar="TOKENS")
    parser.add_argument(
        "--pack-length",
        type=options.positive,
        default=2048,
        metavar="TOKENS",
        help="tokens that go through the model together; fewer take less memory",
    )
    parser.add_argument("--eval-every", type=options.positive, help="updates (default: a tenth)")
    parser.add_argument("--held-out", type=options.positive, default=100, help="rows to judge by")
    parser.add_argument(
        "--patience", type=int, default=3, help="stop after so many worse results; 0 never"
    )
    parser.add_argument("--save-every", type=options.positive, default=10, help="updates")
    parser.add_argument(
        "--no-recompute",
        action="store_true",
        help="keep all activations: faster, and more memory",
    )
    parser.add_argument("--seed", type=options.seed, default=0)
    options.add_resume(parser)
    options.add_json(parser)


def run(args: argparse.Namespace) -> int:
    from ..distributed.ranks import launched
    from ..errors import UsageError

    if launched() and args.action != "train":
        raise UsageError(f"optiq lora {args.action} runs in one process, not under mlx.launch")
    actions = {"train": _train, "info": _info, "merge": _merge, "export": _export}
    return actions[args.action](args)


def _train(args: argparse.Namespace) -> int:
    from ..lora.options import default_init
    from ..lora.training import checkpoint_of, train
    from ..report.training import training_page

    with options.resumable(checkpoint_of(Path(args.out))):
        result = train(
            args.model,
            args.data,
            args.out,
            original=args.original,
            revision=args.revision,
            resume=args.resume,
            restart=args.restart,
            iters=args.iters,
            batch_size=args.batch_size,
            rank=args.rank,
            ranks=args.ranks,
            init=args.init or default_init(args.original, args.dpo),
            scale=args.scale,
            targets=args.targets,
            learning_rate=args.lr,
            warmup=args.warmup,
            weight_decay=args.weight_decay,
            clip=args.clip,
            max_length=args.max_length,
            pack_length=args.pack_length,
            eval_every=args.eval_every,
            held_out=args.held_out,
            patience=args.patience,
            save_every=args.save_every,
            recompute=not args.no_recompute,
            dpo=args.dpo,
            beta=args.beta,
            seed=args.seed,
        )
    if not result.written:
        return 0
    page = result.path / "optiq" / "report.html"
    page.write_text(training_page(result.adapter), encoding="utf-8")
    if args.json:
        print(json.dumps(_as_json(result), indent=1))
    else:
        _print(result)
        print(after(shlex.join(["optiq", "chat", args.model, "--adapter", args.out])))
    return 0


def _as_json(result: Result) -> dict[str, object]:
    return {
        "path": str(result.path),
        "held_out_loss": result.held_out_loss,
        "tokens_per_second": result.tokens_per_second,
        "ranks": result.adapter.ranks,
        "updates": [asdict(u) for u in result.updates],
        "judged": [asdict(j) for j in result.judged],
    }


def _print(result: Result) -> None:
    adapter = result.adapter
    first, last = result.updates[0].loss, result.updates[-1].loss
    lines = [
        ("adapter", str(result.path)),
        ("size", f"{adapter.parameters:,} parameters, {adapter.nbytes:,} bytes"),
        ("loss", f"{first:.4f} at first, {last:.4f} at last"),
        ("report", str(result.path / "optiq" / "report.html")),
        ("speed", f"{result.tokens_per_second:.0f} tokens/s in {len(result.updates)} updates"),
    ]
    if result.judged:
        found = f"{result.judged[0].loss:.4f} before, {result.held_out_loss:.4f} after"
        lines.insert(3, ("held out", found))
    print(facts_lines(lines))


def _info(args: argparse.Namespace) -> int:
    from ..lora.mounting import opened

    adapter = opened(args.adapter)
    ranks = adapter.ranks
    if args.json:
        found = {
            "base": vars(adapter.base) if adapter.base else None,
            "scale": adapter.scale,
            "ranks": ranks,
            "dora": bool(adapter.magnitudes),
            "parameters": adapter.parameters,
            "bytes": adapter.nbytes,
            "sha256": adapter.digest,
            "made": adapter.made,
        }
        print(json.dumps(found, indent=1))
        return 0
    least, most = min(ranks.values()), max(ranks.values())
    base = f"{adapter.base.name} ({adapter.base.fingerprint[:12]})" if adapter.base else "unknown"
    print(f"base       {base}")
    kind = "DoRA of rank" if adapter.magnitudes else "of rank"
    print(f"layers     {len(ranks)}, {kind} {least if least == most else f'{least} to {most}'}")
    print(f"scale      {adapter.scale:g}")
    print(f"size       {adapter.parameters:,} parameters, {adapter.nbytes:,} bytes")
    print(f"sha256     {adapter.digest}")
    return 0


def _weighted(names: list[str]) -> list[tuple[Adapter, float]]:
    from ..errors import UsageError
    from ..lora.mounting import opened

    found = []
    for name in names:
        folder, _, weight = name.partition("=")
        try:
            found.append((opened(folder), float(weight or 1)))
        except ValueError:
            raise UsageError(f"{name} has no number after =; write for example {folder}=0.5") from (
                None
            )
    return found


def _merge(args: argparse.Namespace) -> int:
    from ..lora.merging import merge

    nbytes = merge(args.model, _weighted(args.adapter), args.out, dense=args.dense)
    if args.json:
        print(json.dumps({"path": args.out, "bytes": nbytes}))
    else:
        print(f"model      {args.out}, {nbytes:,} bytes")
    return 0


def _export(args: argparse.Namespace) -> int:
    from ..errors import UsageError
    from ..lora import adapter, merging, peft

    out = Path(args.out).expanduser()
    if out.exists():
        raise UsageError(f"{out} exists; name another folder, or delete it")
    made = merging.combined(_weighted(args.adapter))
    (peft.write if args.to == "peft" else adapter.write)(made, out)
    if args.json:
        print(json.dumps({"path": str(out), "sha256": made.digest, "ranks": made.ranks}))
    else:
        print(f"adapter    {out}, {made.parameters:,} parameters")
    return 0
