"""What Prometheus is told. Names begin with `sfumato_`; nothing in them tells one tenant from another."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)


class Metrics:
    """Counters of one server, in a registry of their own."""

    def __init__(self) -> None:
        made = self.registry = CollectorRegistry()
        self.requests = Counter(
            "sfumato_http_requests_total", "Answers.", ["route", "method", "status"], registry=made
        )
        self.latency = Histogram(
            "sfumato_http_seconds",
            "Seconds until an answer began.",
            ["route"],
            buckets=BUCKETS,
            registry=made,
        )
        self.jobs = Counter(
            "sfumato_jobs_total", "Jobs by how they ended.", ["model", "state"], registry=made
        )
        self.accepted = Counter("sfumato_jobs_accepted_total", "Jobs accepted.", ["model"], registry=made)
        self.refused = Counter("sfumato_jobs_refused_total", "Jobs not accepted.", ["code"], registry=made)
        self.pictures = Counter("sfumato_pictures_total", "Pictures drawn.", ["model"], registry=made)
        self.clips = Counter("sfumato_clips_total", "Clips drawn.", ["model"], registry=made)
        self.seconds = Counter(
            "sfumato_device_seconds_total", "Seconds of devices, by jobs done.", registry=made
        )
        self.charged = Counter(
            "sfumato_charged_micros_total", "Millionths of the currency charged.", registry=made
        )
        self.waited = Histogram(
            "sfumato_job_wait_seconds", "From acceptance to a device.", buckets=BUCKETS, registry=made
        )
        self.took = Histogram(
            "sfumato_job_seconds", "From acceptance to the end.", buckets=BUCKETS, registry=made
        )
        self.queued = Gauge("sfumato_queue_jobs", "Jobs that wait.", registry=made)
        self.running = Gauge("sfumato_running_jobs", "Jobs on devices.", registry=made)
        self.workers = Gauge("sfumato_workers_ready", "Workers that can draw.", registry=made)
        self.restarts = Counter("sfumato_worker_restarts_total", "Workers that were lost.", registry=made)
        self.resident = Gauge(
            "sfumato_worker_resident_bytes", "Memory of a worker.", ["device"], registry=made
        )
        self.calls = Gauge(
            "sfumato_network_calls", "Calls of networks by a worker.", ["device"], registry=made
        )
        self.rows = Gauge("sfumato_network_rows", "Rows in those calls.", ["device"], registry=made)

    def text(self) -> bytes:
        """All of it, as it is scraped."""
        return generate_latest(self.registry)
