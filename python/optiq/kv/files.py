"""The files of `optiq kv`: the configuration, and the report on how it was found beside it."""

from __future__ import annotations

import contextlib
import json
import secrets
from pathlib import Path
from typing import Any

from ..errors import ExportError, KVError, UsageError
from ..preflight import check_unfinished, check_writable
from ..report import kv as page
from .config import KVConfig

KIND = "optiq.kv.report"


class Files:
    """`out` and those beside it: out.report.json, out.report.html, and a checkpoint meanwhile."""

    def __init__(self, out: Path) -> None:
        self.out = out.expanduser().resolve()
        self.report, self.page, self.checkpoint = (
            self.out.with_suffix(suffix)
            for suffix in (".report.json", ".report.html", ".checkpoint.json")
        )

    def check(self, resume: bool) -> None:
        """Raise an OptiqError unless all can be written, and what is there is of our making."""
        if self.out.exists() or self.out.is_symlink():
            try:
                KVConfig.load(self.out)
            except KVError as error:
                raise UsageError(
                    f"{self.out} exists and is no KV configuration of optiq; name another file"
                ) from error
        for path, mark in ((self.report, f'"kind": "{KIND}"'), (self.page, page.MARK)):
            if path.exists() and mark not in path.read_text(encoding="utf-8", errors="replace"):
                raise UsageError(
                    f"{path} exists and was not made by optiq kv; name another file with -o"
                )
        check_writable(self.out)
        check_unfinished(self.checkpoint, resume)

    def write(self, config: KVConfig, report: dict[str, Any]) -> None:
        """Write all, each whole or not at all and the configuration last; raises ExportError."""
        texts = {
            self.report: json.dumps(report, indent=1, allow_nan=False) + "\n",
            self.page: page.render(report),
        }
        mark = f".{secrets.token_hex(4)}.partial"
        partial = {path: path.with_name(path.name + mark) for path in texts}
        try:
            for path, text in texts.items():
                partial[path].write_text(text, encoding="utf-8")
            for path, temporary in partial.items():
                temporary.replace(path)
            config.save(self.out)
        except OSError as error:
            raise ExportError(
                f"{self.out} cannot be written ({error.strerror}); free space, then --resume loses "
                "nothing"
            ) from error
        finally:
            for temporary in partial.values():
                with contextlib.suppress(OSError):
                    temporary.unlink(missing_ok=True)
        self.checkpoint.unlink(missing_ok=True)
