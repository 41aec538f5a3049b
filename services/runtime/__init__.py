"""A server process: settings, life cycle, statuses, interceptors, metrics, logs, microbatching.

The client uses `status` and `tls` too, so they import neither torch nor the serving extra.
"""
