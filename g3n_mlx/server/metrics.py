"""What /metrics reports, by prometheus-client, in a registry of the server's own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

FIRST_TOKEN_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
NEXT_TOKEN_BUCKETS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.1, 0.2, 0.5, 1, 2.5, 5, 10)


class Metrics:
    """The server's metrics; every method of prometheus-client is safe to call from any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter("g3n_requests", "Answered requests", ["path", "status"], registry=self.registry)
        self.waiting = Gauge("g3n_queue_length", "Responses waiting to start", registry=self.registry)
        self.running = Gauge("g3n_running", "Responses in progress", registry=self.registry)
        self.prompt_tokens = Counter("g3n_prompt_tokens", "Tokens of prompts", registry=self.registry)
        self.cached_tokens = Counter(
            "g3n_cached_tokens", "Tokens of prompts found in the prefix cache", registry=self.registry
        )
        self.completion_tokens = Counter("g3n_completion_tokens", "Tokens of responses", registry=self.registry)
        self.drafted_tokens = Counter("g3n_drafted_tokens", "Tokens that were drafted", registry=self.registry)
        self.accepted_tokens = Counter("g3n_accepted_tokens", "Drafted tokens that stayed", registry=self.registry)
        self.cache_hits = Counter(
            "g3n_prefix_cache_hits", "Prompts whose beginning was in the prefix cache", registry=self.registry
        )
        self.cache_misses = Counter(
            "g3n_prefix_cache_misses", "Prompts whose beginning was not", registry=self.registry
        )
        self.shed = Counter(
            "g3n_shed", "Requests that got a smaller slice under load", ["slice"], registry=self.registry
        )
        self.shed_level = Gauge(
            "g3n_shed_level", "Which slice of --shed requests get; 0 is the model itself", registry=self.registry
        )
        self.cache_bytes = Gauge(
            "g3n_prefix_cache_bytes", "Bytes of idle caches kept for later prompts", registry=self.registry
        )
        self.first_token = Histogram(
            "g3n_time_to_first_token_seconds",
            "From the request to its first token",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.next_token = Histogram(
            "g3n_time_between_tokens_seconds",
            "From one token of a response to the next",
            buckets=NEXT_TOKEN_BUCKETS,
            registry=self.registry,
        )

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
