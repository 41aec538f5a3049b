"""Promotion: a registered version passes the gates and is rolled out, or nothing changes.

`promote` runs the steps. `targets` are what a promotion can change: a Deployment's pin on Kubernetes, a model
in Triton, a running service. `gates` decide whether the challenger may be rolled out. `registry` and `ledger`
read and write MLflow.
"""
