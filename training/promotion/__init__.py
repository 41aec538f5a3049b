"""Promotion: a registered version passes the gates and becomes what is served, or nothing changes.

``target`` says what a promotion needs of what it promotes to: ``kubernetes_target`` (a Deployment's pin) or
``local_target`` (a service that switches its model). ``gates`` decide on what ``listening`` heard of the
clips that ``clips`` got through gRPC. ``registry`` and ``ledger`` are MLflow's. `training.promote` strings
them together.
"""
