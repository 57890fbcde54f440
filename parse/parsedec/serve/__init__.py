"""`parsedec serve`: an OpenAI-compatible server over an engine. It needs `pip install 'parsedec[server]'`.

A request goes `guard` (key, size, metrics) -> `app` (routes) -> `asked` (what the body asks for) -> `desk` (queue and
the threads that run the engine) -> `replies` (OpenAI's JSON and events).
"""
