"""Version 1 of the wire. The ``*_pb2`` modules next to this file are generated: ``make protos``."""
