"""Models whose weights are on a server: target and draft model behind OpenAI-compatible endpoints.

`connect` makes a model that `Parse` takes like any other: drafts, cuts, boundary rules, gate and records are the same.
The server's own speculation (EAGLE-3, n-gram, …) is then the inner level, and its prefix cache the judge's shared rows.
"""

from parsedec.remote.capabilities import Capabilities
from parsedec.remote.client import Connection, Server
from parsedec.remote.model import RemoteModel, connect

__all__ = ["Capabilities", "Connection", "RemoteModel", "Server", "connect"]
