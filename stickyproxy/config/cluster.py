"""The section `clusters`: several apps behind one proxy, each with its upstreams, its affinity and its probes."""

import re
from collections.abc import Iterable
from typing import Annotated, Final, Self, cast

from pydantic import BeforeValidator, Field, GetJsonSchemaHandler, PrivateAttr, ValidationError, model_validator
from pydantic_core import CoreSchema
from typing_extensions import override

from stickyproxy.config.affinity import Affinity
from stickyproxy.config.errors import Mistake
from stickyproxy.config.explain import explain
from stickyproxy.config.fields import AlsoWritten, JsonSchema, Section, kind_of, refuse
from stickyproxy.config.health import Health
from stickyproxy.config.units import shown
from stickyproxy.config.upstream import MAX_UPSTREAMS, Upstream, read_upstreams

DEFAULT_CLUSTER: Final = "default"
"""The cluster of the upstreams, or of the app to run, at the top of the file."""
MAX_CLUSTERS: Final = 100  # each has counters of its own in the tables of the workers

OF_THE_PROXY: Final = ("secrets", "max_idle", "max_life", "session_idle", "max_keys")
"""Keys of `affinity` that stand at the top of the file only: tokens and sessions are those of the whole proxy."""

_NAME: Final = re.compile("[a-z0-9-]{1,32}")


class ClusterAffinity(Affinity):
    """Which client goes to which upstream of a cluster."""

    @override
    @classmethod
    def expand(cls, raw: object) -> object:
        """Return the mapping as it is; refuse the keys that are not for a cluster alone."""
        raw = super().expand(raw)
        if isinstance(raw, dict) and (
            mistakes := [
                ((key,), f"{key} is the same for all clusters: it stands in affinity at the top of the file")
                for key in OF_THE_PROXY
                if key in raw
            ]
        ):
            refuse(mistakes)
        return raw

    @override
    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchema:
        schema = handler(core_schema)
        properties = handler.resolve_ref_schema(schema)["properties"]
        for key in OF_THE_PROXY:
            properties.pop(key, None)
        return schema


class Cluster(Section):
    """The app processes that serve one app, and which client goes to which of them. `name` is its key in the file."""

    upstreams: Annotated[
        tuple[Annotated[Upstream, AlsoWritten({"type": "string"})], ...], BeforeValidator(read_upstreams)
    ] = Field(max_length=MAX_UPSTREAMS, description="The app processes, each by its URL or with more keys.")
    affinity: ClusterAffinity = Field(
        default_factory=ClusterAffinity, description="Which client goes to which upstream of the cluster."
    )
    health: Health = Field(default_factory=Health, description="Whether an upstream of the cluster can serve.")

    _name: str = PrivateAttr(default="")

    @model_validator(mode="after")
    def _check_upstreams(self) -> Self:
        if not self.upstreams:
            refuse([(("upstreams",), "expected at least one upstream")])
        return self

    @property
    def name(self) -> str:
        """The name of the cluster, in routes, metrics and commands."""
        return self._name

    @classmethod
    def named(cls, name: str, raw: object) -> Self:
        """Return the cluster that a mapping of the file describes. Raises `ValueError` and `ValidationError`."""
        made = cls.model_validate(raw)
        made._name = name  # noqa: SLF001 -- its own
        return made

    @classmethod
    def of_parts(cls, name: str, upstreams: tuple[Upstream, ...], affinity: Affinity, health: Health) -> Self:
        """Return the cluster that sections at the top of the file describe; they have been validated."""
        made = cls.model_construct(upstreams=upstreams, affinity=cast("ClusterAffinity", affinity), health=health)
        made._name = name  # noqa: SLF001 -- as above
        return cast("Self", made)


class ByName:
    """Mark a list of sections that the file writes as a mapping from names."""

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchema:
        items = handler(schema)["items"]
        return {
            "type": "object",
            "propertyNames": {"pattern": f"^(?:{_NAME.pattern})$"},
            "additionalProperties": items,
            "maxProperties": MAX_CLUSTERS,
        }


def read_clusters(raw: object) -> object:
    """Return the clusters of a mapping, by name. Raises `ValueError`, and `ValidationError` with all mistakes."""
    if isinstance(raw, tuple):
        return raw  # they are clusters already
    if not isinstance(raw, dict):
        raise ValueError(f"expected a mapping from names to clusters, got {kind_of(raw)}")  # noqa: TRY004 -- pydantic collects these
    if len(raw) > MAX_CLUSTERS:
        raise ValueError(f"expected at most {MAX_CLUSTERS} clusters, got {len(raw)}")
    found: list[Cluster] = []
    mistakes: list[Mistake] = []
    for name, one in raw.items():
        try:
            found.append(Cluster.named(_check_name(name), one))
        except ValidationError as error:
            mistakes.extend(((name, *path), message) for path, message in explain(error, Cluster))
        except ValueError as error:
            mistakes.append(((name,), str(error)))
    if mistakes:
        refuse(mistakes)
    return tuple(sorted(found, key=lambda one: one.name))  # their order in the file says nothing


def _check_name(name: str) -> str:
    if name == DEFAULT_CLUSTER:
        raise ValueError("the cluster default is that of the upstreams at the top of the file")
    if not _NAME.fullmatch(name):
        raise ValueError(f"expected a name of 1 to 32 lower-case letters, digits and hyphens, got {shown(name)}")
    return name


def find_shared_upstreams(clusters: Iterable[Cluster]) -> Iterable[Mistake]:
    """Yield a mistake for each upstream whose id or address is one of another cluster: tokens and counters go by id."""
    ids: dict[str, str] = {}
    addresses: dict[object, str] = {}
    for cluster in clusters:
        for position, upstream in enumerate(cluster.upstreams):
            path = ("clusters", cluster.name, "upstreams", position)
            other = addresses.get(upstream.address, cluster.name)
            if other != cluster.name:
                yield (*path, "url"), f"{upstream.address} is an upstream of the cluster {other} already"
            elif (other := ids.get(upstream.id, cluster.name)) != cluster.name:
                yield (*path, "id"), f"the id '{upstream.id}' is taken by an upstream of the cluster {other}"
            ids.setdefault(upstream.id, cluster.name)
            addresses.setdefault(upstream.address, cluster.name)
