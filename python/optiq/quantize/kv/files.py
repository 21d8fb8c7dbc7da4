"""The files of `optiq kv`: the configuration, and the report on how it was found beside it."""

from __future__ import annotations

import json
from pathlib import Path

from ...base.checkpoint import check_unfinished
from ...base.files import check_absent, check_writable, whole
from ...errors import ExportError, KVError, UsageError
from ...kv.config import KVConfig
from ...kv.report import KIND, KVReport
from ...report import kv as page
from ..sensitivity.checkpoint import existing


class Files:
    """`out` and those beside it: out.report.json, out.report.html, and a checkpoint meanwhile."""

    def __init__(self, out: Path) -> None:
        self.out = out.expanduser().resolve()
        self.report, self.page, self.checkpoint = (
            self.out.with_suffix(suffix)
            for suffix in (".report.json", ".report.html", ".checkpoint.json")
        )

    def check(self, *, overwrite: bool) -> None:
        """Raise an OptiqError unless all can be written; ours may be there with `overwrite`."""
        if self.out.exists() or self.out.is_symlink():
            try:
                KVConfig.load(self.out)
            except KVError as error:
                raise UsageError(
                    f"{self.out} exists and is not a KV configuration of optiq; name another file"
                ) from error
            check_absent(self.out, overwrite)
        for path, mark in ((self.report, f'"kind": "{KIND}"'), (self.page, page.MARK)):
            if path.exists() and mark not in path.read_text(encoding="utf-8", errors="replace"):
                raise UsageError(
                    f"{path} exists and was not made by optiq kv; name another file with -o"
                )
        check_writable(self.out)

    def check_unfinished(self, *, resume: bool, restart: bool) -> None:
        """Raise UsageError rather than discard what an earlier run left, unless that is wanted."""
        check_unfinished(existing(self.checkpoint), resume=resume, restart=restart)

    def write(self, config: KVConfig, report: KVReport) -> None:
        """Write all, each whole or not at all and the configuration last; raises ExportError."""
        facts = json.dumps(report.to_json(), indent=1, allow_nan=False) + "\n"
        shown = page.kv_page(report)
        try:
            with whole(self.report, self.page) as (json_file, html_file):
                json_file.write_text(facts, encoding="utf-8")
                html_file.write_text(shown, encoding="utf-8")
            config.save(self.out)
        except OSError as error:
            raise ExportError(
                f"{self.out} cannot be written ({error.strerror}); free space, then --resume loses "
                "nothing"
            ) from error

    def forget(self) -> None:
        """Remove the checkpoints."""
        for file in existing(self.checkpoint):
            file.unlink(missing_ok=True)
