"""Grafana's dashboards as code, and a Prometheus for this machine.

`python -m k8s.observability` (`make dashboards`) writes the dashboards' JSON into
the chart. The manifests beside this are a demo: see README.md.
"""
