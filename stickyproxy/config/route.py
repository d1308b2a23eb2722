"""The section `routes`: which requests go to which cluster, by host and path."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Final, Self

from pydantic import Field, model_validator

from stickyproxy.config.address import read_host
from stickyproxy.config.affinity import Cookie, CookieDomain, CookiePath, SameSite, Secure
from stickyproxy.config.cluster import DEFAULT_CLUSTER, Cluster
from stickyproxy.config.errors import Mistake
from stickyproxy.config.explain import read_sections
from stickyproxy.config.fields import Flag, Read, Seconds, Section, read_text, refuse, text
from stickyproxy.config.units import shown

MAX_ROUTES: Final = 1000  # a request is compared with those of its host, one by one

_read_path = text(r"/[\x21\x22\x24-\x3e\x40-\x7e]*", 'a path that begins with "/", without spaces, "?" and "#"')
_WILDCARD: Final = "*."


def read_route_host(raw: object) -> str:
    """Return a host in lower case, or `*.` with a domain below which all are meant. Raises `ValueError`."""
    written = read_text(raw)
    start = _WILDCARD if written.startswith(_WILDCARD) else ""
    try:
        host = read_host(written.removeprefix(start)).removesuffix(".")
    except ValueError as error:
        raise ValueError(
            f'expected a host without a port, such as example.org, "*.example.org" or "[::1]", got {shown(written)}'
        ) from error
    return f"[{host}]" if ":" in host else start + host


def read_route_path(raw: object) -> str:
    """Return a path without a slash at its end, but for the path of all. Raises `ValueError`."""
    return str(_read_path.read(raw)).rstrip("/") or "/"


class RouteCookie(Section):
    """What a route says of the affinity cookie, over what its cluster says; null: as there."""

    path: CookiePath | None = Field(default=None, description="The paths that the browser sends the cookie to.")
    domain: CookieDomain | None = Field(default=None, description="The domain with its subdomains that get the cookie.")
    max_age_s: Seconds | None = Field(default=None, description="How long the browser keeps the cookie.")
    http_only: Flag | None = Field(default=None, description="Whether scripts of the page cannot read the cookie.")
    same_site: SameSite | None = Field(
        default=None, description="Whether the cookie goes along with requests from other sites."
    )
    secure: Secure | None = Field(
        default=None, description="Whether the cookie goes over TLS only; auto: where the client came by TLS."
    )
    partitioned: Flag | None = Field(
        default=None, description="Whether the cookie is kept apart for each embedding site."
    )

    def over(self, cookie: Cookie) -> Cookie:
        """Return the cookie of a cluster with what this says in place of its own; nothing is checked."""
        said = {name: getattr(self, name) for name in type(self).model_fields}
        return cookie.model_copy(update={name: value for name, value in said.items() if value is not None})


class Route(Section):
    """The requests for one host and path, and the cluster that serves them."""

    host: Annotated[str, Read(read_route_host, {"type": "string"})] | None = Field(
        default=None, description='The host, without a port; "*.example.org": all below example.org; null: any.'
    )
    path: Annotated[str, Read(read_route_path, _read_path.json_schema)] | None = Field(
        default=None, description="The path, and all below it; null: any. /tool is not the path of /toolbox."
    )
    cluster: Annotated[str, Read(read_text, {"type": "string"})] = Field(
        description="The name of the cluster; default: the upstreams at the top of the file."
    )
    strip_prefix: Flag = Field(
        default=False, description="Whether the path is taken off, and sent as X-Forwarded-Prefix instead."
    )
    cookie: RouteCookie | None = Field(
        default=None, description="Attributes of the affinity cookie, over those that the cluster says."
    )

    @model_validator(mode="after")
    def _check_prefix(self) -> Self:
        if self.strip_prefix and self.path in {None, "/"}:
            refuse([(("strip_prefix",), "strip_prefix needs a path that can be taken off")])
        return self

    @property
    def place(self) -> str:
        """What the route is for, in words: `shop.example.org/tool`, `/chat`, `*`."""
        return f"{self.host or ''}{self.path or ''}" or "*"


def read_routes(raw: object) -> object:
    """Return the routes of a list. Raises `ValueError` and `ValidationError`, the latter with all mistakes."""
    if isinstance(raw, list) and len(raw) > MAX_ROUTES:
        raise ValueError(f"expected at most {MAX_ROUTES} routes, got {len(raw)}")
    return read_sections(raw, Route, _find_repeated_routes)


def _find_repeated_routes(routes: dict[int, Route]) -> Iterable[Mistake]:
    seen: set[tuple[str | None, str]] = set()
    for position, route in routes.items():
        what = route.host, route.path or "/"
        if what in seen:
            yield (position,), f"there is a route for {route.place} above"
        seen.add(what)


def find_route_mistakes(routes: tuple[Route, ...], clusters: Mapping[str, Cluster]) -> Iterator[Mistake]:
    """Yield a mistake for each route that does not go with the clusters, and each cluster that has no route."""
    for position, route in enumerate(routes):
        cluster = clusters.get(route.cluster)
        if cluster is None:
            yield ("routes", position, "cluster"), _explain_unknown(route.cluster, clusters)
        elif route.cookie is not None:
            yield from (
                (("routes", position, "cookie", *path), message)
                for path, message in _find_cookie_mistakes(route.cookie, cluster)
            )
    for name in clusters.keys() - {route.cluster for route in routes} - {DEFAULT_CLUSTER}:
        yield ("clusters", name), f"no route leads to the cluster {name}"


def _explain_unknown(name: str, clusters: Mapping[str, Cluster]) -> str:
    if name == DEFAULT_CLUSTER:
        return "there is no cluster default: it is that of upstreams or run at the top of the file"
    return f"there is no cluster {shown(name)}; there are {', '.join(clusters)}"


def _find_cookie_mistakes(said: RouteCookie, cluster: Cluster) -> Iterator[Mistake]:
    cookie = cluster.affinity.cookie
    if cookie is None:
        yield (), f"the cluster {cluster.name} has no affinity cookie (cookie: false)"
    else:
        yield from said.over(cookie).find_mistakes()
