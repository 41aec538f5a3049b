"""Text to audio in production: models, engine, services, client and commands."""

import os

# gRPC reads it when it is imported. It reports a failed handshake on stderr, in addition to the call's error.
os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
