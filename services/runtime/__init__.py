"""A server process: settings, life cycle, statuses, interceptors, metrics, logs, microbatching.

`status` and `tls` are also the client's, so they import neither torch nor the serving extra.
"""
