"""Version 1 of the wire. The ``*_pb2`` modules beside this file are generated: ``make protos``."""
