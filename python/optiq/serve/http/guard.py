"""Who may ask: the Host that was meant, and the key."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Mapping, Sequence

from ..options import LOOPBACK_NAMES, Options
from ..protocols.problems import Refusal

OPEN_PATHS = frozenset({"/", "/health", "/ready"})  # no key: they say nothing
# What is answered changes for everybody, and a path of this machine is read.
ADMIN_PATHS = frozenset({"/v1/load_lora_adapter", "/v1/unload_lora_adapter"})


class Guard:
    """Checks the headers of a request.

    A web page may make a browser ask a server on loopback under a name that the page's owner
    points there (DNS rebinding). So the name in Host must be one of ours.
    """

    def __init__(self, options: Options) -> None:
        self._keys = tuple(key.encode() for key in options.api_keys)
        self._admin_keys = tuple(key.encode() for key in options.admin_keys)
        self._hosts = LOOPBACK_NAMES | {options.host, *options.allowed_hosts}
        self._hosts = frozenset(host.lower() for host in self._hosts)
        # Behind a wildcard there are addresses that we do not know. No name can be behind one.
        self._any_address = options.host in ("0.0.0.0", "::")

    def check(self, path: str, headers: Mapping[str, str]) -> None:
        """Raises Refusal."""
        host = _host(headers.get("host", ""))
        if host not in self._hosts and not (self._any_address and _is_address(host)):
            raise Refusal(
                403,
                "host_not_allowed",
                f"the Host {host[:100]!r} is not a name of this server; start it with "
                "--allowed-host NAME to allow it",
            )
        if path in ADMIN_PATHS:
            if not self._admin_keys:
                raise Refusal(
                    403,
                    "admin_key_needed",
                    "adapters are mounted by who has an admin key; start the server with "
                    "--admin-key-file FILE",
                )
            self._check_key(headers, self._admin_keys)
        elif self._keys and path not in OPEN_PATHS:
            self._check_key(headers, (*self._keys, *self._admin_keys))

    def _check_key(self, headers: Mapping[str, str], keys: Sequence[bytes]) -> None:
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        given = [headers.get("x-api-key", ""), bearer if scheme.lower() == "bearer" else ""]
        # Each pair is compared, in a time that does not depend on where they differ.
        equal = [
            hmac.compare_digest(key, one.strip().encode("utf-8", "surrogateescape"))
            for key in keys
            for one in given
        ]
        if not any(equal):
            raise Refusal(
                401,
                "invalid_api_key",
                "the API key is missing or wrong; send it as 'Authorization: Bearer KEY' or "
                "'x-api-key: KEY'",
            )


def _host(value: str) -> str:
    """The name in a Host header, without its port and brackets."""
    if value.startswith("["):
        return value[1:].partition("]")[0].lower()
    return value.partition(":")[0].rstrip(".").lower()


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True
