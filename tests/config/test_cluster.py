"""The section `clusters`: what it reads, and what it refuses with which words."""

from __future__ import annotations

import pytest

from stickyproxy.config.cluster import MAX_CLUSTERS
from stickyproxy.config.errors import ConfigErrors
from stickyproxy.config.load import json_schema, load_text
from stickyproxy.config.schema import Config

TWO = """
upstreams: [http://127.0.0.1:8001]
clusters:
  shop:
    upstreams: [http://127.0.0.1:8101, {id: shop-2, url: "http://127.0.0.1:8102"}]
    affinity: {policy: round_robin, on_unavailable: refuse, client_address: true, cookie: {same_site: strict}}
    health: {probe: {path: /healthz}}
  chat: {upstreams: [http://127.0.0.1:8201]}
routes: [{path: /shop, cluster: shop}, {path: /chat, cluster: chat}]
"""


def mistakes(text: str) -> list[str]:
    with pytest.raises(ConfigErrors) as caught:
        load_text(text, {})
    return [f"{error.path_in_file}: {error.message}" for error in caught.value.errors]


def test_a_cluster_is_read() -> None:
    default, chat, shop = load_text(TWO, {}).every_cluster
    assert (default.name, chat.name, shop.name) == ("default", "chat", "shop")
    assert [one.id for one in shop.upstreams] == ["127.0.0.1:8101", "shop-2"]
    assert (shop.affinity.policy, shop.affinity.on_unavailable.action, shop.affinity.client_address) == (
        "round_robin",
        "refuse",
        True,
    )
    assert shop.health.probe is not None
    assert shop.health.probe.path == "/healthz"
    assert chat.affinity.model_dump() == default.affinity.model_dump()
    assert [one.id for one in load_text(TWO, {}).every_upstream][:2] == ["127.0.0.1:8001", "127.0.0.1:8201"]


def test_the_order_of_clusters_says_nothing() -> None:
    shop, chat = "shop: {upstreams: [http://a:1]}", "chat: {upstreams: [http://a:2]}"
    routes = "routes: [{path: /shop, cluster: shop}, {path: /chat, cluster: chat}]"
    one, other = (load_text(f"clusters: {{{', '.join(both)}}}\n{routes}", {}) for both in ([shop, chat], [chat, shop]))
    assert one == other
    assert one != load_text(f"clusters: {{{chat.replace('a:2', 'a:3')}, {shop}}}\n{routes}", {})


def test_there_need_be_no_default_cluster() -> None:
    config = load_text("clusters: {a: {upstreams: [http://a:1]}}\nroutes: [{cluster: a}]", {})
    assert [one.name for one in config.every_cluster] == ["a"]
    assert (config.has_default, config.has_upstreams, config.has_cookie) == (False, True, True)
    assert [one.name for one in Config().every_cluster] == ["default"]
    assert not Config().has_upstreams


@pytest.mark.parametrize(
    ("cluster", "mistake"),
    [
        ("Shop: {upstreams: [http://a:1]}", ".Shop: expected a name of 1 to 32 lower-case letters, digits and"),
        ("default: {upstreams: [http://a:1]}", ".default: the cluster default is that of the upstreams at the top"),
        ("a: {}", ".a: the key 'upstreams' is missing"),
        ("a: {upstreams: []}", ".a.upstreams: expected at least one upstream"),
        ("a: [http://a:1]", ".a: expected a mapping of keys, got a list"),
        ("a: {upstreams: [http://a:1], healt: {}}", ".a.healt: unknown key 'healt'; did you mean 'health'?"),
        ("a: {upstreams: [http://a:1, x]}", ".a.upstreams[1]: expected a URL such as"),
        ("a: {upstreams: [http://a:1], affinity: {cookie: {name: ' '}}}", ".a.affinity.cookie.name: expected a cookie"),
        *(
            (f"a: {{upstreams: [http://a:1], affinity: {{{key}: 1s}}}}", f".a.affinity.{key}: {key} is the same")
            for key in ("secrets", "max_idle", "max_life", "session_idle")
        ),
        ("a: {upstreams: [http://127.0.0.1:9]}", ".a.upstreams[0]: 127.0.0.1:9 is an upstream of the cluster default"),
        ("a: {upstreams: [{url: http://a:1, id: first}]}", ".a.upstreams[0].id: the id 'first' is taken by an"),
        ("a: {upstreams: [http://a:1], affinity: {cookie: {name: stickyproxy}}}",
         ".a.affinity.cookie.name: stickyproxy is the name of the affinity cookie of the cluster default too"),
        ("a: {upstreams: [http://a:1]}\n  b: {upstreams: [http://a:2]}", ".b: no route leads to the cluster b"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_place(cluster: str, mistake: str) -> None:
    upstreams, routes = "upstreams: [{id: first, url: http://127.0.0.1:9}]", "routes: [{path: /a, cluster: a}]"
    [found] = [one for one in mistakes(f"{upstreams}\nclusters:\n  {cluster}\n{routes}") if "routes" not in one]
    assert found.startswith(f"clusters{mistake}")


def test_what_is_no_mapping_and_too_many_are_refused() -> None:
    assert mistakes("clusters: [a]") == ["clusters: expected a mapping from names to clusters, got a list"]
    many = ", ".join(f"c{number}: {{}}" for number in range(MAX_CLUSTERS + 1))
    assert mistakes(f"clusters: {{{many}}}") == ["clusters: expected at most 100 clusters, got 101"]
    lists = [", ".join(f"http://{name}:{port}" for port in range(1, 601)) for name in "ab"]
    [found] = mistakes(
        f"upstreams: [{lists[0]}]\nclusters: {{a: {{upstreams: [{lists[1]}]}}}}\nroutes: [{{cluster: a}}]"
    )
    assert found == "clusters: expected at most 1000 upstreams in all clusters together"


def test_the_schema_says_it_as_the_file_does() -> None:
    schema = json_schema()
    clusters = schema["properties"]["clusters"]
    assert (clusters["type"], clusters["default"]) == ("object", {})
    assert clusters["additionalProperties"] == {"$ref": "#/$defs/Cluster"}
    assert "secrets" not in schema["$defs"]["ClusterAffinity"]["properties"]
    assert "secrets" in schema["$defs"]["Affinity"]["properties"]


# The names of cookies


@pytest.mark.parametrize(
    ("more", "names"),
    [
        ("", ["stickyproxy", "stickyproxy-chat", "stickyproxy-shop"]),
        ("listeners: ['127.0.0.1:8081']", ["stickyproxy-8081", "stickyproxy-chat-8081", "stickyproxy-shop-8081"]),
        ("listeners: [':443', ':8081']", ["stickyproxy", "stickyproxy-chat", "stickyproxy-shop"]),
        ("listeners: [':0']", ["stickyproxy", "stickyproxy-chat", "stickyproxy-shop"]),
        ("listeners: ['unix:/run/x']", ["stickyproxy", "stickyproxy-chat", "stickyproxy-shop"]),
        (f"listeners: [':8081']\naffinity: {{secrets: [{'x' * 32}]}}",
         ["stickyproxy", "stickyproxy-chat", "stickyproxy-shop"]),
        ("listeners: [':8081']\naffinity: {cookie: {name: mine}}",
         ["mine", "stickyproxy-chat-8081", "stickyproxy-shop-8081"]),
    ],
)  # fmt: skip
def test_a_cookie_without_a_name_is_named_after_its_cluster_and_the_port(more: str, names: list[str]) -> None:
    config = load_text(f"{TWO}\n{more}", {})
    assert [config.name_cookie(one) for one in config.every_cluster] == names
