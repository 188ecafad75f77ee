"""
What the server counts, in the form that Prometheus reads: GET /metrics.

Counters and histograms are kept here, on the event loop; what runs and waits is asked of the worker when somebody
looks. Tokens are those of the `usage` of the answers, those of answers that were never finished included.
"""

from bisect import bisect_left
from collections import Counter

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Histogram:
    """How many values lie below each of `bounds`, and their sum."""

    def __init__(self, bounds=SECONDS):
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)  # the last: above all bounds
        self.sum = 0.0

    def observe(self, value):
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def buckets(self):
        """[(upper bound as text, how many values lie at or below it)], as Prometheus has them."""
        pairs = []
        below = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            below += count
            pairs.append((str(bound), below))
        return pairs


class Metrics:
    """The metrics of one server. `worker` is its serving.worker.Worker."""

    def __init__(self, worker):
        self.worker = worker
        self.requests = Counter()  # (route, status) -> how many
        self.aborted = Counter()  # reason -> how many
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.generated_tokens = 0
        self.first_token = Histogram()
        self.gap = Histogram()
        self.queue = Histogram()
        self.registry = CollectorRegistry()
        self.registry.register(self)

    def count_request(self, route, status):
        self.requests[route, str(status)] += 1

    def count_job(self, job, usage):
        """Count a job that has ended. usage: that of its answer, as OpenAI has it."""
        if job.error:
            self.aborted[job.error] += 1
        if job.waited is None:
            return  # it never ran
        self.prompt_tokens += usage["prompt_tokens"]
        self.cached_tokens += usage["prompt_tokens_details"]["cached_tokens"]
        self.generated_tokens += usage["completion_tokens"]
        self.queue.observe(job.waited)
        if job.first_token is not None:
            self.first_token.observe(job.first_token - job.submitted)
        for seconds in job.gaps:
            self.gap.observe(seconds)

    def text(self):
        """All metrics as Prometheus reads them, bytes."""
        return generate_latest(self.registry)

    # -------------------------------------------------------------------------

    def describe(self):
        """prometheus_client asks for this when the metrics are registered: their names need not be known then."""
        return []

    def collect(self):
        """Yield every metric; prometheus_client calls this."""
        requests = CounterMetricFamily("minichat_requests", "Answers that began; 499: the client left before.",
                                       labels=("route", "status"))
        for labels, count in sorted(self.requests.items()):
            requests.add_metric(labels, count)
        yield requests
        aborted = CounterMetricFamily("minichat_aborted", "Generations that ended early.", labels=("reason",))
        for reason, count in sorted(self.aborted.items()):
            aborted.add_metric((reason,), count)
        yield aborted
        worker = self.worker
        yield CounterMetricFamily("minichat_prompt_tokens", "Tokens of prompts.", self.prompt_tokens)
        yield CounterMetricFamily("minichat_cached_tokens", "Tokens of prompts found in the cache.", self.cached_tokens)
        yield CounterMetricFamily("minichat_generated_tokens", "Tokens of answers.", self.generated_tokens)
        yield CounterMetricFamily("minichat_engine_steps", "Passes of the model.", worker.steps)
        yield GaugeMetricFamily("minichat_running", "Requests that run.", worker.running)
        yield GaugeMetricFamily("minichat_waiting", "Requests that wait.", worker.waiting)
        yield GaugeMetricFamily("minichat_kv_blocks_free", "Free blocks of the cache.", worker.free_blocks)
        yield GaugeMetricFamily("minichat_kv_blocks_total", "All blocks of the cache.", worker.total_blocks)
        yield histogram("minichat_time_to_first_token_seconds", "From arrival to the first token.", self.first_token)
        yield histogram("minichat_token_gap_seconds", "Between the tokens of a request.", self.gap)
        yield histogram("minichat_queue_seconds", "From arrival to the first step.", self.queue)


def histogram(name, description, values):
    return HistogramMetricFamily(name, description, buckets=values.buckets(), sum_value=values.sum)
