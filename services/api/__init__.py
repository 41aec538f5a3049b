"""Requests, events, answers and ports as plain values: what commands, client, services and training share.

Imports neither torch nor protobuf. `generation` has the request, its events and the port `ClipMaker`;
`scoring` has CLAP scores, rewards and the port `Scorers`; `best` chooses the best of several clips; `engine`
has the engine's settings.
"""
