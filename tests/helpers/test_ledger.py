"""The ledger: each way in which the two ends can disagree is a finding, and nothing else is."""

import pytest

from tests.helpers.ledger import Arrival, Ledger, Receipt, Verdict


def receipt_of(request_id: str, client: str = "ann", app: str = "alpha", generation: int = 1) -> Receipt:
    return Receipt(app, generation, 1, request_id, client, 1, 1)


def arrival_of(request_id: str, method: str = "POST", client: str = "ann", app: str = "alpha") -> Arrival:
    return Arrival(app, 1, method, request_id, client)


def test_what_was_answered_where_it_arrived_is_no_finding() -> None:
    ledger = Ledger()
    request_id = ledger.begin("POST", "ann")
    ledger.end(request_id, Verdict(200, receipt=receipt_of(request_id)))
    assert ledger.findings([arrival_of(request_id)]) == []
    assert not ledger.errors()


@pytest.mark.parametrize("verdict", [Verdict(502), Verdict(broken="aborted")], ids=lambda verdict: verdict.name)
@pytest.mark.parametrize("times", [0, 1])
def test_a_visible_error_is_counted_and_is_no_finding(verdict: Verdict, times: int) -> None:
    ledger = Ledger()
    request_id = ledger.begin("POST", "ann")
    ledger.end(request_id, verdict)
    assert ledger.findings([arrival_of(request_id)] * times) == []
    assert ledger.errors() == {verdict.name: 1}
    assert ledger.errors({"ann"}) == {verdict.name: 1}
    assert not ledger.errors({"bob"})


def test_a_request_without_a_verdict_is_lost() -> None:
    ledger = Ledger()
    request_id = ledger.begin("GET", "ann")
    assert ledger.findings([]) == [f"GET {request_id} of ann has 0 verdicts"]


def test_two_answers_to_one_request() -> None:
    ledger = Ledger()
    request_id = ledger.begin("GET", "ann")
    ledger.end(request_id, Verdict(502))
    ledger.end(request_id, Verdict(502))
    assert ledger.findings([]) == [f"GET {request_id} of ann has 2 verdicts"]


@pytest.mark.parametrize("verdict", [Verdict(502), Verdict(broken="aborted")], ids=lambda verdict: verdict.name)
def test_a_post_that_arrives_twice_is_doubled_also_if_it_failed(verdict: Verdict) -> None:
    ledger = Ledger()
    request_id = ledger.begin("POST", "ann")
    ledger.end(request_id, verdict)
    arrivals = [arrival_of(request_id), arrival_of(request_id, app="beta")]
    assert ledger.findings(arrivals) == [f"POST {request_id} of ann arrived 2 times: alpha, beta"]


def test_a_get_that_arrives_twice_is_repeated_and_no_finding() -> None:
    ledger = Ledger()
    request_id = ledger.begin("GET", "ann")
    ledger.end(request_id, Verdict(200, receipt=receipt_of(request_id, app="beta")))
    arrivals = [arrival_of(request_id, "GET"), arrival_of(request_id, "GET", app="beta")]
    assert ledger.findings(arrivals) == []
    assert ledger.repeated(arrivals) == {request_id: 2}


def test_the_answer_to_another_client() -> None:
    ledger = Ledger()
    of_ann, of_bob = ledger.begin("GET", "ann"), ledger.begin("GET", "bob")
    ledger.end(of_ann, Verdict(200, receipt=receipt_of(of_bob, "bob")))
    ledger.end(of_bob, Verdict(504))
    arrivals = [arrival_of(of_ann, "GET"), arrival_of(of_bob, "GET", "bob")]
    assert [f.partition(":")[0] for f in ledger.findings(arrivals)] == [
        f"{of_ann} of ann was answered what is meant for another"
    ]


@pytest.mark.parametrize("answered_by", [("beta", 1), ("alpha", 2)])
def test_an_answer_from_where_the_request_did_not_arrive(answered_by: tuple[str, int]) -> None:
    ledger = Ledger()
    request_id = ledger.begin("GET", "ann")
    ledger.end(request_id, Verdict(200, receipt=receipt_of(request_id, "ann", *answered_by)))
    findings = ledger.findings([arrival_of(request_id, "GET")])
    assert [f.partition(":")[0] for f in findings] == [f"{request_id} of ann was answered where it did not arrive"]


def test_a_good_answer_that_no_app_gave() -> None:
    ledger = Ledger()
    request_id = ledger.begin("GET", "ann")
    ledger.end(request_id, Verdict(200))
    assert ledger.findings([arrival_of(request_id, "GET")]) == [f"no app says that it answered {request_id} with 200"]


def test_a_cut_response_shows_where_it_came_from_and_is_an_error() -> None:
    ledger = Ledger()
    request_id = ledger.begin("GET", "ann")
    ledger.end(request_id, Verdict(200, "truncated", receipt_of(request_id)))
    assert ledger.findings([arrival_of(request_id, "GET")]) == []
    assert ledger.errors() == {"truncated": 1}


@pytest.mark.parametrize(("method", "client"), [("PUT", "ann"), ("POST", "bob")])
def test_what_arrives_is_what_was_sent(method: str, client: str) -> None:
    ledger = Ledger()
    request_id = ledger.begin("POST", "ann")
    ledger.end(request_id, Verdict(502))
    arrival = arrival_of(request_id, method, client)
    assert ledger.findings([arrival]) == [f"nobody sent what arrived: {arrival}"]


def test_an_id_that_nobody_gave_out() -> None:
    ledger = Ledger()
    arrival = arrival_of(f"{ledger.begin('GET', 'ann').partition('-')[0]}-99")
    assert f"nobody sent what arrived: {arrival}" in ledger.findings([arrival])


def test_arrivals_of_another_ledger_are_overlooked() -> None:
    assert Ledger().findings([arrival_of(Ledger().begin("POST", "ann"))]) == []


def test_an_arrival_reads_as_it_was_written() -> None:
    arrival = arrival_of("1")
    assert Arrival.read(arrival.write().decode()) == arrival
