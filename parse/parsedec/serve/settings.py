"""Settings of the server, as `conf/serve.yaml` gives them."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass

from parsedec.errors import ConfigError, require_number

KEY_VARIABLE = "PARSEDEC_API_KEY"
RUNS = ("auto", "batch", "threads")


@dataclass(frozen=True, kw_only=True)
class ServeSettings:
    """Where the server listens and what it lets in.

    host, port          where it listens; port 0: any free one
    model               the name clients call the engine by; None: the target's
    api_key             "env": clients must send one of the keys in PARSEDEC_API_KEY, separated by commas; None: no key.
                        A client is identified by its key or else by the address of its connection. X-Forwarded-For is
                        not believed, so behind a proxy all are one client unless they have keys
    at_once             answers written at a time
    run                 "batch": answers share the models' passes; "threads": one thread each, for models on servers;
                        "auto": whichever fits the models
    queue               answers that may wait besides. More get 429 at once, except for a client that holds less than
                        its share of the room (at most as many again may wait this way)
    max_request_bytes   longest request body; a longer one gets 413
    max_tokens          most tokens a client may ask for, and most of an answer to one that asks for none
    max_choices         most answers to one request (`n`, times the prompts of a completion)
    drain_s             seconds that answers in progress get after SIGTERM
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model: str | None = None
    api_key: str | None = None
    at_once: int = 8
    run: str = "auto"
    queue: int = 64
    max_request_bytes: int = 1_000_000
    max_tokens: int = 8192
    max_choices: int = 8
    drain_s: float = 30.0

    def __post_init__(self) -> None:
        least = {"at_once": 1, "queue": 0, "max_request_bytes": 1024, "max_tokens": 1, "max_choices": 1, "drain_s": 0}
        for name, bound in least.items():
            require_number(f"serve.{name}", getattr(self, name), whole=name != "drain_s", low=bound)
        require_number("serve.port", self.port, whole=True, low=0, high=65535)
        if self.run not in RUNS:
            raise ConfigError(f"serve.run='{self.run}'; expected one of {', '.join(RUNS)}.")
        if self.api_key not in (None, "env"):
            raise ConfigError(
                "serve.api_key holds something else than env or null. Keys are not given on the command line, where "
                f"others can read them: use serve.api_key=env and set {KEY_VARIABLE}."
            )

    @property
    def keys(self) -> tuple[str, ...]:
        """The keys that clients may send; if there are none, no key is asked for."""
        if self.api_key is None:
            return ()
        keys = tuple(key.strip() for key in os.environ.get(KEY_VARIABLE, "").split(",") if key.strip())
        if not keys:
            raise ConfigError(f"serve.api_key=env, but {KEY_VARIABLE} is not set. Set it to the key clients send.")
        return keys

    @property
    def unguarded(self) -> bool:
        """Whether other machines can reach the server without a key."""
        try:
            here = ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            here = self.host == "localhost"
        return self.api_key is None and not here
