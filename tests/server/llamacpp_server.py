"""Serve a GGUF file with xllamacpp until the process is ended: python llamacpp_server.py FILE PORT."""

import signal
import sys

from xllamacpp import CommonParams, Server

parameters = CommonParams()
parameters.model.path, parameters.port = sys.argv[1], int(sys.argv[2])
parameters.n_parallel, parameters.n_ctx = 2, 4096
parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = 1
server = Server(parameters)
print(server.listening_address, flush=True)
signal.pause()
