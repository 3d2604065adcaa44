"""The parts of the server that need no server: prices, keys, rates, files, settings."""

from __future__ import annotations

import asyncio
import json
import math
import os
import socket
import stat
from pathlib import Path
from urllib.parse import urlencode

import pytest
from hypothesis import given
from hypothesis import strategies as st

from asgi import asked, desk_of
from sfumato.cli.app import run
from sfumato.cluster.replicas import Outbox
from sfumato.errors import InputError
from sfumato.serve import keys, money
from sfumato.serve.job import Live, fairest, next_for
from sfumato.serve.ledger import Ledger, Record
from sfumato.serve.money import Prices, Rule, Work, work_of
from sfumato.serve.rates import Rates
from sfumato.serve.settings import ModelSpec, Settings, is_loopback, model_given, named_files, read_models
from sfumato.serve.store import Store, is_id, new_id
from sfumato.serve.web.app import build
from sfumato.serve.wire import Broken, Line
from sfumato.serve.worker.discreet import of_models

# --- money -----------------------------------------------------------------------------------------------------------


def prices(tmp_path: Path, text: str) -> Prices:
    file = tmp_path / "prices.toml"
    file.write_text(text)
    return money.read_prices(file)


def test_prices_are_exact(tmp_path):
    read = prices(
        tmp_path,
        'currency = "EUR"\n[[rule]]\nmodel = "pocket"\npicture = 0.1\nmegapixel_step = 0.000003\nsecond = 0.2\n'
        "[[rule]]\nleast = 0.0000001\n",
    )
    assert read.currency == "EUR"
    work = Work(pictures=3, pixel_steps=3 * 1000 * 1000 * 10, seconds=0.5)
    assert read.most("pocket", work) == 300_000 + 90 + 200_000  # twice the seconds that are expected
    assert read.due("pocket", work, 10**9) == 300_000 + 90 + 100_000
    assert read.due("pocket", work, 1000) == 1000  # never more than was reserved
    assert read.most("other", work) == 1  # a tenth of a millionth, rounded up


def test_frames_of_clips_have_a_price_of_their_own(tmp_path):
    read = prices(tmp_path, "[[rule]]\npicture = 1\nframe = 0.002\nmegapixel_step = 0.01\n")
    clips = work_of({"pictures": 2, "frames": 9, "pixel_steps": 2 * 9 * 10**6}, 1.0)
    assert clips == Work(0, 18 * 10**6, 1.0, 18) and read.most("m", clips) == 18 * 2_000 + 180_000
    pictures = work_of({"pictures": 2, "pixel_steps": 10**6}, 1.0)
    assert read.most("m", pictures) == 2_000_000 + 10_000


def test_without_rules_everything_is_free():
    assert Prices().most("x", Work(10, 10**9, 100.0)) == 0


def test_a_model_without_a_rule_is_said_at_once():
    with pytest.raises(InputError, match="no rule for the model 'b'"):
        Prices(rules=(Rule("a"),)).rule("b")


@pytest.mark.parametrize(
    "text",
    ["[[rule]]\nprice = 1", "[[rule]]\npicture = -1", "[[rule]]\npicture = nan", "[[rule]]\npicture = inf", "x = 1",
     '[[rule]]\npicture = "1"', "[[rule]]\npicture = true", "rule = 3", "currency = 4", "[[rule", "[[rule]]\nmodel = 3",
     "[[rule]]\nsecond = 1e30"],
)  # fmt: skip
def test_a_price_file_is_read_strictly(tmp_path, text):
    with pytest.raises(InputError):
        prices(tmp_path, text)


@given(st.integers(0, 10**9), st.integers(0, 10**13), st.floats(0, 1e5))
def test_what_is_due_is_never_more_than_was_reserved(pictures, pixel_steps, seconds):
    rule = Rule(
        picture=money.Decimal("0.003"), megapixel_step=money.Decimal("0.00002"), second=money.Decimal("0.1")
    )
    table = Prices(rules=(rule,))
    work = Work(pictures, pixel_steps, seconds)
    assert 0 <= table.due("m", work, table.most("m", work)) <= table.most("m", work)


def test_amounts():
    assert money.amount("2.50", "budget") == 2_500_000
    assert money.amount("0.0000001", "budget") == 1
    assert money.shown(2_500_000, "USD") == "2.50 USD"
    assert money.shown(123, "EUR") == "0.000123 EUR"
    for text in ("x", "-1", "NaN", "1e99", ""):
        with pytest.raises(InputError):
            money.amount(text, "budget")


# --- keys ------------------------------------------------------------------------------------------------------------


def test_a_key_is_kept_as_its_hash_alone(tmp_path):
    file = tmp_path / "keys.json"
    token, key = keys.add(file, "studio", budget=5)
    assert token.startswith("sfk_") and len(token) > 40
    assert token not in file.read_text() and token[4:] not in file.read_text()
    assert stat.S_IMODE(os.stat(file).st_mode) == 0o600
    assert keys.KeyRing(file).find(token) == key
    assert key.digest not in repr(key)


def test_a_revoked_key_is_refused_at_the_next_request(tmp_path):
    file = tmp_path / "keys.json"
    token, _ = keys.add(file, "a")
    other, _ = keys.add(file, "b")
    ring = keys.KeyRing(file)
    assert ring.find(token) and ring.find(other)
    keys.revoke(file, "a")
    assert ring.find(token) is None and ring.find(other)
    again, _ = keys.add(file, "a")  # the name is free again, the key another
    assert ring.find(token) is None and ring.find(again)
    file.unlink()
    assert ring.find(other) is None


def test_no_other_key_opens(tmp_path):
    file = tmp_path / "keys.json"
    token, key = keys.add(file, "a")
    ring = keys.KeyRing(file)
    for wrong in ("", "sfk_", token[:-1], token + "x", token.upper(), key.id, key.digest, "\udcff", "a"):
        assert ring.find(wrong) is None


def test_names_of_keys(tmp_path):
    keys.add(tmp_path / "k", "a")
    for name in ("", "x" * 81, "a\nb"):
        with pytest.raises(InputError):
            keys.add(tmp_path / "k", name)
    with pytest.raises(InputError, match="already"):
        keys.add(tmp_path / "k", "a")
    with pytest.raises(InputError, match="no key"):
        keys.revoke(tmp_path / "k", "b")


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"keys": 3}', '{"keys": [{"name": "x"}]}', '{"keys": [{"a": 1}]}']
)
def test_a_file_that_is_no_keys_is_refused(tmp_path, text):
    (tmp_path / "k").write_text(text)
    with pytest.raises(InputError):
        keys.KeyRing(tmp_path / "k")


def test_the_command_line_of_keys(tmp_path, capsys):
    file = str(tmp_path / "keys.json")
    assert run(["keys", "add", "studio", "--keys", file, "--budget", "2.5", "--rate", "60", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert keys.KeyRing(file).find(made["key"]).budget == 2_500_000
    assert run(["keys", "list", "--keys", file, "--json"]) == 0
    [listed] = json.loads(capsys.readouterr().out)["keys"]
    assert listed["rate"] == 60 and "digest" not in listed
    assert run(["keys", "revoke", "studio", "--keys", file]) == 0
    assert keys.KeyRing(file).find(made["key"]) is None
    for wrong in (["--rate", "0"], ["--budget", "x"], ["--queue", "many"]):
        assert run(["keys", "add", "other", "--keys", file, *wrong]) == 2
    assert run(["usage", "--data", str(tmp_path)]) == 2
    assert "no ledger" in capsys.readouterr().err


# --- rates -----------------------------------------------------------------------------------------------------------


def test_a_rate_lets_a_minutes_worth_through_and_then_waits():
    rates = Rates()
    assert [rates.take("a", 3, now=0.0) for _ in range(3)] == [0, 0, 0]
    assert rates.take("a", 3, now=0.0) == pytest.approx(20)
    assert rates.look("a", 3, now=0.0) == pytest.approx(20)
    assert rates.take("b", 3, now=0.0) == 0
    assert [rates.look("d", 1, now=0.0) for _ in range(3)] == [0, 0, 0]  # to look takes nothing
    assert rates.take("a", 3, now=19.0) > 0
    assert rates.take("a", 3, now=40.5) == 0
    assert all(rates.take("c", None, now=0.0) == 0 for _ in range(1000))


# --- files -----------------------------------------------------------------------------------------------------------


def test_ids_are_the_only_names(tmp_path):
    store = Store(tmp_path / "s")
    name = new_id("file")
    store.put(name, b"x")
    assert store.get(name) == b"x"
    for wrong in (
        "../x",
        "file_",
        name + "/..",
        name.upper(),
        new_id("job"),
        "",
        "a" * 10_000,
        "file_" + "é" * 32,
    ):
        assert not is_id(wrong, "file")
        with pytest.raises(InputError):
            store.get(wrong)
    store.drop(name)
    assert store.get(name) is None
    store.drop(name)


def test_outputs_are_all_there_or_none(tmp_path):
    store = Store(tmp_path / "s")
    job = new_id("job")
    store.put_outputs(job, [b"a", b"b"])
    store.put_outputs(job, [b"c", b"d"])  # a second try, after a crash before the bill
    assert [store.output(job, k).read_bytes() for k in (0, 1)] == [b"c", b"d"]
    assert store.output(job, 2) is None
    assert [p.name for p in (tmp_path / "s" / "outputs").iterdir()] == [job]
    small = store.thumb(job, 1, lambda data: data * 2)
    assert small.read_bytes() == b"dd"
    assert store.thumb(job, 1, lambda data: b"again") == small and small.read_bytes() == b"dd"
    assert store.thumb(job, 2, bytes.upper) is None
    store.put(alone := new_id("file"), b"x")  # of a job that was not heard of again
    assert store.sweep(1000) == 0 and store.sweep(-1) == 3
    assert (
        store.get(alone) is None and store.output(job, 0) is None and store.thumb(job, 0, bytes.upper) is None
    )


# --- what clients are not told ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("{place}/my models/xl.safetensors: it ends early", "xl: it ends early"),
        ("'{place}/my models/xl.safetensors' reads no prompt", "'xl' reads no prompt"),
        ("{place}/my models/xl.safetensors.index.json is gone", "xl.index.json is gone"),
        ("the LoRA {place}/ink.safetensors fits nothing", "the LoRA ink fits nothing"),
        ("/opt/other/place/file.bin (part 2) cannot be read", "… (part 2) cannot be read"),
        (
            "see '~/secret/place', and /v1/files or /sdapi/v1/samplers",
            "see '…', and /v1/files or /sdapi/v1/samplers",
        ),
        ("steps must be between 1 and 1000, not 3/4", "steps must be between 1 and 1000, not 3/4"),
        (
            "the nearest legal size is 128x128 and/or 256x256",
            "the nearest legal size is 128x128 and/or 256x256",
        ),
        ("'moves' reads no prompt; leave it out", "'moves' reads no prompt; leave it out"),
        ("it has none; one is opened with the model, by `controlnets` a=FILE", "it has none"),
    ],
)
def test_a_message_says_no_place_of_this_machine(tmp_path, said, told):
    spec = ModelSpec(
        "xl", f"{tmp_path}/my models/xl.safetensors", loras={"ink": f"{tmp_path}/ink.safetensors"}
    )
    assert of_models([spec, ModelSpec("pocket", "pocket")])(said.format(place=tmp_path)) == told


# --- settings --------------------------------------------------------------------------------------------------------


def test_only_this_machine_is_served_without_keys(tmp_path):
    models = (ModelSpec("pocket", "pocket"),)
    for host in ("127.0.0.1", "localhost", "::1", "127.9.9.9"):
        assert is_loopback(host)
        Settings(models, tmp_path, host=host).validate()
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        with pytest.raises(InputError, match="--keys"):
            Settings(models, tmp_path, host=host).validate()
    keys.add(tmp_path / "k", "a")
    Settings(models, tmp_path, host="0.0.0.0", keys=tmp_path / "k").validate()
    with pytest.raises(InputError, match="keys add"):
        Settings(models, tmp_path, keys=tmp_path / "none").validate()


def test_settings_name_what_is_wrong(tmp_path):
    one = ModelSpec("pocket", "pocket")
    for change in ({"models": ()}, {"models": (one, one)}, {"port": 70_000}, {"queue": 0}, {"batch": 0},
                   {"deadline": 0}, {"deadline": 10_000.0}, {"body": 1}, {"grace": -1}):  # fmt: skip
        with pytest.raises(InputError):
            Settings(**({"models": (one,), "data": tmp_path} | change)).validate()
    for change, said in (
        ({"keep": 0.0}, "keep must be between a minute and 3650 days, not 0 days"),
        ({"keep": math.nan}, "not nan days"),
        ({"keep": 3651 * 86400.0}, "not 3651 days"),
        ({"memory": 1000}, "memory must be 1MiB or more, such as 6GB, not 1,000 bytes"),
    ):
        with pytest.raises(InputError, match=said):
            Settings((one,), tmp_path, **change).validate()


@pytest.mark.parametrize(
    ("since", "until", "said"),
    [
        ("2026-13-45", "2026-12-31", 'since must be a day such as 2026-01-31, not "2026-13-45"'),
        ("2026-02-29", "2026-12-31", "since must be a day"),
        ("2026-01-01", "20260131", "until must be a day"),
        ("2026-01-01", "٢٠٢٦-٠١-٣١", "until must be a day"),
        ("2026-01-01", "2026-W01-1", "until must be a day"),
        ("2026-02-01", "2026-01-31", "until 2026-01-31 is before since 2026-02-01"),
    ],
)
def test_days_that_are_none_are_refused(tmp_path, capsys, since, until, said):
    Ledger(f"sqlite:///{tmp_path / 'ledger.db'}").close()
    assert run(["usage", "--data", str(tmp_path), "--since", since, "--until", until]) == 2
    assert said in capsys.readouterr().err
    with desk_of(tmp_path) as desk:
        query = urlencode({"since": since, "until": until})
        status, _, body = asked(build(desk), "GET", f"/v1/usage?{query}")
    assert status == 400 and json.loads(body)["error"]["message"].startswith(said[:20])


def test_who_only_looks_whether_it_is_there_is_answered(tmp_path):
    with desk_of(tmp_path) as desk:
        app = build(desk)
        for path in ("/", "/healthz", "/page/js/main.js"):
            status, headers, _ = asked(app, "HEAD", path)
            assert status == 200 and headers["content-length"] == str(len(asked(app, "GET", path)[2]))
        assert asked(app, "HEAD", "/readyz")[0] == asked(app, "GET", "/readyz")[0] == 503


def test_models_and_files_are_named(tmp_path):
    assert model_given("pocket") == ModelSpec("pocket", "pocket")
    assert model_given("/x/sd_xl.safetensors").name == "sd_xl"
    assert model_given("mine=/x/y").source == "/x/y"
    with pytest.raises(InputError, match="NAME=MODEL"):
        model_given("a b=/x")
    assert named_files("lora", ["ink=/x/y.safetensors", "/x/wash.safetensors"]) == {
        "ink": "/x/y.safetensors",
        "wash": "/x/wash.safetensors",
    }
    with pytest.raises(InputError):
        named_files("lora", ["a=b", "a=c"])
    file = tmp_path / "models.toml"
    file.write_text('[[model]]\nname = "p"\nsource = "pocket"\n[model.loras]\nink = "ink.safetensors"\n')
    assert read_models(file) == (ModelSpec("p", "pocket", loras={"ink": "ink.safetensors"}),)
    for text in (
        "x = 1",
        '[[model]]\nname = "p"',
        '[[model]]\nname = "p"\nsource = "s"\nwhat = 1',
        "[[model",
    ):
        file.write_text(text)
        with pytest.raises(InputError):
            read_models(file)


# --- whose turn it is -----------------------------------------------------------------------------------------------


def job(tenant: str, made: float, pictures: int = 1, tune: str = "m", memory: int = 1, **more) -> Live:
    expected = {"pictures": pictures, "memory": memory, "seconds": 1.0}
    options = {"expected": expected, "sampler_steps": 4, "tune": tune}
    return Live(Record(new_id("job"), tenant, "m", {}, options, "d", made, made + 60, 0), **more)


def test_tenants_take_turns():
    queue = [job("a", 1), job("a", 2), job("b", 3)]
    assert fairest(queue, [], {}) is queue[0]
    assert fairest(queue, [job("a", 0)], {}) is queue[2]
    assert fairest(queue, [], {"a": 5}) is queue[2]
    assert fairest(queue, [], {"a": 5, "b": 6}) is queue[0]
    assert fairest([], [], {}) is None


def test_what_is_drawn_at_once_goes_together():
    here = [job("a", 1, pictures=2, memory=10)]
    assert next_for(job("b", 2), [], 8, 0)  # alone, anything that was accepted begins
    assert next_for(job("b", 2, pictures=6), here, 8, 100)
    assert next_for(job("b", 2, pictures=7), here, 8, 100) is None
    assert next_for(job("b", 2, tune="other"), here, 8, 100) is None
    assert next_for(job("b", 2, memory=91), here, 8, 100) is None
    assert next_for(job("b", 2, alone=True), here, 8, 100) is None
    assert next_for(job("b", 2), [job("a", 1, alone=True)], 8, 100) is None
    assert next_for(job("b", 2, pictures=64), [], 8, 100)
    assert next_for(None, here, 8, 100) is None


def test_who_listens_late_loses_the_oldest():
    live = job("a", 1)
    with live.listening() as listener:
        for step in range(1000):
            live.publish("progress", {"step": step})
        assert listener.get_nowait().data["step"] == 1000 - listener.maxsize


# --- messages between processes -------------------------------------------------------------------------------------


def test_messages_arrive_as_they_were_sent():
    ours, theirs = socket.socketpair()
    front, worker = Line(ours), Line(theirs)
    front.send({"do": "x", "text": "é\n"}, [b"", b"\0" * 100_000])
    assert worker.receive() == ({"do": "x", "text": "é\n"}, [b"", b"\0" * 100_000])
    ours.close()
    front._stream.close()
    with pytest.raises(Broken):
        worker.receive()


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        b"\0\0\0\x02[]",
        b"\0\0\0\x02{}",
        b'\0\0\0\x0d{"parts":[-1]}',
        b"\0\0\0\x01{",
        b"\0",
    ],
)
def test_what_is_no_message_is_refused(data):
    ours, theirs = socket.socketpair()
    ours.sendall(data)
    ours.close()
    with pytest.raises(Broken):
        Line(theirs).receive()


# --- a worker at the other end of a cluster -------------------------------------------------------------------------


def test_who_comes_to_a_replica_hears_that_it_is_ready_and_what_follows():
    async def listening() -> None:
        outbox = Outbox()
        outbox.send({"is": "ready", "models": []})
        outbox.send({"is": "pulse"})  # to nobody
        first = outbox.open()
        await asyncio.to_thread(outbox.send, {"is": "look"}, (b"x",))
        assert [await first.get(), await first.get()] == [
            ({"is": "ready", "models": []}, []),
            ({"is": "look"}, [b"x"]),
        ]
        second = outbox.open()  # a front that was started again
        outbox.send({"is": "done"}, (b"y", b"z"))
        assert (await second.get())[0]["is"] == "ready" and (await second.get())[1] == [b"y", b"z"]
        assert first.empty() and not outbox.close(first) and outbox.close(second)
        outbox.send({"is": "done"})
        await asyncio.sleep(0)
        assert second.empty()

    asyncio.run(listening())
