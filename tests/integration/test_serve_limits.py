"""Money, rates, queues, keys and turns; and what the server tells of itself."""

from __future__ import annotations

from dataclasses import fields

import pytest

from serving import Client, error
from sfumato import Request
from sfumato.serve import keys

pytestmark = pytest.mark.full  # a server of its own

LONG = {"steps": 1000, "count": 2}


def test_money_runs_out_and_says_so(server, ring):
    poor = Client(server, ring[1]["poor"])
    request = {"steps": 2, "size": [32, 32]}
    for _ in range(2):
        poor.wait(poor.submit(request)["id"])
    refused = poor.post("/v1/jobs", {"request": {"prompt": "x", **request}})
    assert error(refused) == (402, "budget_exceeded") and "left this month" in refused.text
    month = poor.get("/v1/usage").json()["month"]
    assert month["budget_micros"] == 3_000 and 0 < month["spent_and_reserved_micros"] <= 3_000


def test_a_rate_is_kept(server, ring):
    slow = Client(server, ring[1]["slow"])
    answers = [slow.post("/v1/jobs", {"request": {"prompt": "x", "steps": 1}}) for _ in range(3)]
    assert [each.status_code for each in answers] == [202, 202, 429]
    assert error(answers[2])[1] == "rate_limited" and 1 <= int(answers[2].headers["retry-after"]) <= 60


def test_a_key_may_have_so_many_open(server, ring):
    narrow = Client(server, ring[1]["narrow"])
    job = narrow.submit(LONG)
    refused = narrow.post("/v1/jobs", {"request": {"prompt": "x"}})
    assert error(refused) == (429, "too_many_open") and refused.headers["retry-after"]
    narrow.post(f"/v1/jobs/{job['id']}/cancel")
    assert narrow.wait(narrow.submit()["id"])["state"] == "succeeded"


def test_a_full_queue_says_when_to_come_back(a):
    jobs, refused = [], []
    for _ in range(40):
        answer = a.post("/v1/jobs", {"request": {"prompt": "x", "steps": 200, "count": 8}})
        (jobs if answer.status_code == 202 else refused).append(answer)
    assert refused and all(error(each)[0] == 429 for each in refused)
    assert {error(each)[1] for each in refused} <= {"queue_full", "too_busy"}
    assert all(1 <= int(each.headers["retry-after"]) <= 120 for each in refused)
    for each in jobs:
        assert a.post(f"/v1/jobs/{each.json()['id']}/cancel").status_code == 200


def test_what_would_take_longer_than_its_deadline_is_refused(a):
    wrong = {"request": {"prompt": "x", "steps": 1000, "count": 64, "size": [2048, 2048]}, "deadline": 5}
    answer = a.post("/v1/jobs", wrong)
    assert error(answer) == (400, "bad_input") and answer.json()["error"]["param"] in ("deadline", "size")


def test_a_key_that_is_revoked_is_refused_at_once(server, ring):
    leaving = Client(server, ring[1]["leaving"])
    assert leaving.get("/v1/models").status_code == 200
    keys.revoke(ring[0], "leaving")
    assert error(leaving.get("/v1/models")) == (401, "invalid_api_key")


def test_only_keys_for_it_watch_and_they_draw_nothing(server, ring, a):
    watch = Client(server, ring[1]["watch"])
    assert watch.get("/metrics").status_code == 200
    assert error(watch.get("/v1/models")) == (403, "forbidden")
    assert error(a.get("/metrics")) == (403, "forbidden")


def test_the_document_describes_what_is_there(server, a):
    document = Client(server).get("/openapi.json").json()
    assert {"/v1/jobs", "/v1/images/generations", "/sdapi/v1/txt2img", "/healthz"} <= set(document["paths"])
    body = document["paths"]["/v1/jobs"]["post"]["requestBody"]["content"]["application/json"]
    assert a.post("/v1/jobs", body["example"]).status_code == 202
    for path, item in document["paths"].items():  # every example is one
        example = item.get("post", {}).get("requestBody", {}).get("content", {}).get("application/json")
        if example is not None:
            answer = a.post(path, example["example"])
            assert answer.status_code in (200, 202), (path, answer.text)
    described = body["schema"]["properties"]["request"]["properties"]
    assert set(described) == {field.name for field in fields(Request)}
    assert described["image"]["anyOf"][0]["pattern"].startswith("^file_")


def test_the_page_has_a_strict_policy_and_asks_nobody_else(server):
    answer = Client(server).get("/")
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/html")
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy
    assert "http://" not in answer.text and "https://" not in answer.text


def test_a_tenant_with_many_jobs_does_not_keep_another_waiting(a, b):
    waits = [a.submit({"steps": 20, "count": 8})["id"] for _ in range(4)]
    assert b.wait(b.submit({"steps": 2})["id"])["state"] == "succeeded"
    states = [a.get(f"/v1/jobs/{job}").json()["state"] for job in waits]
    assert states.count("queued") >= 2
    for job in waits:
        a.post(f"/v1/jobs/{job}/cancel")


def test_prometheus_reads_what_it_is_told(a, metrics, watch):
    a.wait(a.submit()["id"])
    found = metrics()
    assert found["sfumato_pictures_total"] >= 1 and found["sfumato_workers_ready"] == 1
    assert found["sfumato_charged_micros_total"] > 0 and found["sfumato_http_requests_total"] >= 1
    text = watch.get("/metrics").text
    assert "job_" not in text.replace("sfumato_job_", "") and "key_" not in text
