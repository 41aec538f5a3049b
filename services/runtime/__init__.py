"""What every service shares: server, settings, statuses, interceptors, metrics, logs, audio, model URIs.

`status` and `audio` are also the client's, so they import neither torch nor the serving extra.
"""
