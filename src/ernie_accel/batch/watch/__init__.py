"""Show how a job is going; nothing here depends on where its pictures go.

snapshot    the state of a job at one moment
telemetry   counts what happens; the progress bar, JSON lines and the file for Prometheus
exposition  a state in Prometheus' text format
metrics     the port at which a Prometheus can scrape it
"""
