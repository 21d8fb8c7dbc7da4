"""How each agent is told of the server: files in a folder of its own, and its environment.

Nothing of the user's is read or written: the agents look for their settings in `folder` alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ANSWER_SHARE = 4  # an answer may take one in so many tokens of the context


@dataclass(frozen=True)
class Served:
    """A model on a server; `key` is that of the server, if it has one."""

    url: str
    model: str
    context: int
    key: str | None = None

    @property
    def answer(self) -> int:
        return max(1, self.context // ANSWER_SHARE)


@dataclass(frozen=True)
class Setup:
    """What starts an agent: its files (by their paths), environment and first arguments."""

    files: Mapping[Path, str] = field(default_factory=dict)
    environment: Mapping[str, str] = field(default_factory=dict)
    arguments: Sequence[str] = ()


@dataclass(frozen=True)
class Agent:
    """`program` is its command, `package` brings it by npm."""

    program: str
    package: str
    set_up: Callable[[Served, Path], Setup]


def _codex(served: Served, folder: Path) -> Setup:
    text = json.dumps  # TOML's basic strings are written as JSON's
    key = 'env_key = "OPTIQ_API_KEY"\n' if served.key else ""
    config = f"""\
model = {text(served.model)}
model_provider = "optiq"
model_context_window = {served.context}
check_for_update_on_startup = false
web_search = "disabled"

[model_providers.optiq]
name = "optiq"
base_url = {text(served.url + "/v1")}
wire_api = "responses"
{key}
[analytics]
enabled = false
"""
    environment = {"CODEX_HOME": str(folder), **_key(served)}
    return Setup({folder / "config.toml": config}, environment)


def _opencode(served: Served, folder: Path) -> Setup:
    model = {"limit": {"context": served.context, "output": served.answer}}
    config = {
        "$schema": "https://opencode.ai/config.json",
        "autoupdate": False,
        "share": "disabled",
        "provider": {
            "optiq": {
                "npm": "@ai-sdk/openai-compatible",
                "options": {"baseURL": f"{served.url}/v1", "apiKey": served.key or "none"},
                "models": {served.model: model},
            }
        },
        "model": f"optiq/{served.model}",
        "small_model": f"optiq/{served.model}",
    }
    file = folder / "opencode.json"
    places = {f"XDG_{name}_HOME": str(folder / name.lower()) for name in _XDG}
    switches = dict.fromkeys(
        (
            "OPENCODE_DISABLE_AUTOUPDATE",
            "OPENCODE_DISABLE_MODELS_FETCH",
            "OPENCODE_DISABLE_LSP_DOWNLOAD",
        ),
        "1",
    )
    environment = {"OPENCODE_CONFIG": str(file), **places, **switches}
    return Setup({file: _json(config)}, environment)


_XDG = ("CONFIG", "DATA", "STATE", "CACHE")


def _pi(served: Served, folder: Path) -> Setup:
    model = {
        "id": served.model,
        "contextWindow": served.context,
        "maxTokens": served.answer,
        "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0},
    }
    provider = {
        "baseUrl": f"{served.url}/v1",
        "api": "openai-completions",
        "apiKey": served.key or "none",
        "models": [model],
    }
    files = {folder / "models.json": _json({"providers": {"optiq": provider}})}
    environment = {"PI_CODING_AGENT_DIR": str(folder), "PI_OFFLINE": "1"}
    return Setup(files, environment, ("--provider", "optiq", "--model", served.model))


def _qwen(served: Served, folder: Path) -> Setup:
    settings = {
        "security": {"auth": {"selectedType": "openai"}},
        "privacy": {"usageStatisticsEnabled": False},
        "general": {"disableAutoUpdate": True},
    }
    environment = {
        "QWEN_HOME": str(folder),
        "OPENAI_BASE_URL": f"{served.url}/v1",
        "OPENAI_API_KEY": served.key or "none",
        "OPENAI_MODEL": served.model,
    }
    files = {folder / "settings.json": _json(settings)}
    return Setup(files, environment, ("--auth-type", "openai"))


def _claude(served: Served, folder: Path) -> Setup:
    kinds = ("MODEL", *(f"DEFAULT_{size}_MODEL" for size in ("OPUS", "SONNET", "HAIKU")))
    environment = {
        "CLAUDE_CONFIG_DIR": str(folder),
        "ANTHROPIC_BASE_URL": served.url,
        "ANTHROPIC_AUTH_TOKEN": served.key or "none",
        "ANTHROPIC_API_KEY": "",  # the user's own is not for this server
        **{f"ANTHROPIC_{kind}": served.model for kind in kinds},
        "CLAUDE_CODE_MAX_CONTEXT_TOKENS": str(served.context),
        "CLAUDE_CODE_MAX_OUTPUT_TOKENS": str(served.answer),
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    }
    files = {folder / ".claude.json": _json({"hasCompletedOnboarding": True})}
    return Setup(files, environment)


def _key(served: Served) -> dict[str, str]:
    return {"OPTIQ_API_KEY": served.key} if served.key else {}


def _json(value: object) -> str:
    return json.dumps(value, indent=1) + "\n"


AGENTS = {
    "claude": Agent("claude", "@anthropic-ai/claude-code", _claude),
    "codex": Agent("codex", "@openai/codex", _codex),
    "opencode": Agent("opencode", "opencode-ai", _opencode),
    "pi": Agent("pi", "@mariozechner/pi-coding-agent", _pi),
    "qwen": Agent("qwen", "@qwen-code/qwen-code", _qwen),
}
