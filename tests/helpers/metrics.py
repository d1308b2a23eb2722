"""What stands in the text of `/metrics`."""

from collections.abc import Iterator

from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.samples import Sample


def samples_of(text: str) -> Iterator[Sample]:
    """Give each sample."""
    for family in text_string_to_metric_families(text):
        yield from family.samples


def total(text: str, name: str, **labels: str) -> float:
    """Return the sum of the samples of `stickyproxy_<name>` that have these labels; 0 if there is none."""
    return sum(
        sample.value
        for sample in samples_of(text)
        if sample.name == f"stickyproxy_{name}" and labels.items() <= sample.labels.items()
    )
