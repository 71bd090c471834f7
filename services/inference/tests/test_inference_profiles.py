"""Response profiles and shaped answers behind a real server and real engines, over gRPC, HTTP and raw SSE bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import pytest_asyncio
from served_profiles import widened, write_profiles
from served_toy import Served, ask, refused, served_toy

from loraline.api.inference.v1 import inference_pb2 as pb
from loraline.core.errors import LoralineError
from loraline.core.testing.waiting import until
from loraline.inference.engines.port import Constraint
from loraline.inference.language.rules import rule_of
from loraline.inference.profiles.registry import Profiles
from loraline.inference.structured.shape import shape_of

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]
TYPED = {"structured_answer_cut", "structured_answer_invalid", "language_mismatch"}


@pytest_asyncio.fixture(
    loop_scope="module",
    scope="module",
    params=["transformers", pytest.param("vllm", marks=[pytest.mark.vllm, pytest.mark.slow])],
)
async def served(request: Any, toy: Any, tmp_path_factory: Any) -> AsyncIterator[Served]:
    if request.param == "vllm":
        pytest.importorskip("vllm")
    root = tmp_path_factory.mktemp("profiles")
    settings = {
        "max_model_len": 4096,
        "max_tokens": 2000,
        "profiles_dir": write_profiles(root / "own"),
        "profile_reconnect_seconds": 3,
        "profile_heartbeat_seconds": 0.2,
        "profile_max_streams": 8,
    }
    async with served_toy(request.param, widened(toy.model, root / "wide"), root / "data", **settings) as one:
        one.new_key("anna")
        one.new_key("ben")
        yield one


def client(served: Served, key: str = "anna", **headers: str) -> httpx.AsyncClient:
    return httpx.AsyncClient(
        base_url=f"{served.http}/v1", headers={"authorization": f"Bearer {served.keys[key]}", **headers}, timeout=300
    )


def events_of(text: str) -> list[tuple[str, str, Any]]:
    """Return (id, event, data) of server-sent events."""
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if ": " in line and not line.startswith(":"))
        if "data" in fields:
            found.append((fields["id"], fields["event"], json.loads(fields["data"])))
    return found


def spoken(text: str, language: str, *forbid: str) -> bool:
    rule = rule_of(language, forbid, "")
    return rule is not None and rule.problem(text) == ""


async def curl(served: Served, *arguments: str, key: str = "anna") -> str:
    """Run curl and return the raw bytes that came, as text."""
    process = await asyncio.create_subprocess_exec(
        *("curl", "-sS", "-N", "--max-time", "200", "-H", f"authorization: Bearer {served.keys[key]}"),
        *arguments,
        stdout=asyncio.subprocess.PIPE,
    )
    output, _ = await process.communicate()
    return output.decode()


async def test_profiles_are_listed(served: Served) -> None:
    listed = (await served.call("ListProfiles", pb.ListProfilesRequest())).profiles
    assert [profile.name for profile in listed] == ["challenge", "commands", "extract", "mini", "slow"]
    challenge = listed[0]
    assert (challenge.language, challenge.streamed_field, challenge.event) == ("ko", "challenges", "challenge")
    assert [field.name for field in challenge.fields if field.required] == ["location", "work_type", "category"]
    first = await served.call("ListProfiles", pb.ListProfilesRequest(page_size=2))
    second = await served.call("ListProfiles", pb.ListProfilesRequest(page_token=first.next_page_token))
    assert [profile.name for profile in second.profiles] == ["extract", "mini", "slow"]
    async with client(served) as http:
        names = [profile["name"] for profile in (await http.get("/profiles")).json()["data"]]
        one = (await http.get("/profiles/mini")).json()
    assert names == [profile.name for profile in listed]
    assert one["fields"][0]["name"] == "harbour"


async def test_fields_and_free_text_give_the_same_shape(served: Served) -> None:
    inputs: list[Any] = [{"harbour": "north", "weather": "storm"}, "I want a boat", {"harbour": "south"}]
    async with client(served) as http:
        for number, given in enumerate(inputs):
            answer = (await http.post("/profiles/mini", json={"input": given, "seed": number, "retries": 2})).json()
            assert set(answer) == {"profile", "answer", "model", "usage", "notices"}, answer
            assert set(answer["answer"]) == {"word", "boats"}
            assert spoken(answer["answer"]["word"], "ko")
    assert served.metric("loraline_inference_profile_answers_total", profile="mini", outcome="ok") >= 3


async def test_a_profile_over_grpc_chat(served: Served) -> None:
    request = ask("a boat please", temperature=1.0, max_tokens=160)
    request.profile = "mini"
    request.structured.retries = 3
    pieces = await served.chat(request)
    assert set(json.loads("".join(piece.delta for piece in pieces))) == {"word", "boats"}
    fields = pb.ChatRequest(profile="mini")
    fields.profile_input.update({"harbour": "north"})
    fields.structured.retries = 3
    assert set(json.loads("".join(piece.delta for piece in await served.chat(fields)))) == {"word", "boats"}
    wrong = {
        "profile_input.harbour": {},
        "profile_input.weather": {"harbour": "x", "weather": "fog"},
        "profile_input.boat": {"harbour": "x", "boat": 1},
    }
    for path, given in wrong.items():
        fields.ClearField("profile_input")
        fields.profile_input.update(given)
        error = await refused(served.chat(fields))
        assert (error.reason, list(error.fields)) == ("PROFILE_INPUT_INVALID", [path])
    request.structured.regex = "a"
    assert list((await refused(served.chat(request))).fields) == ["structured"]
    assert (await refused(served.chat(pb.ChatRequest()))).reason == "INVALID_REQUEST"


async def test_raw_events_by_curl(served: Served) -> None:
    text = await curl(
        served,
        *("-H", "accept: text/event-stream", "-H", "content-type: application/json", "-i"),
        *("-d", '{"input": "a boat", "seed": 4, "max_tokens": 400}', f"{served.http}/v1/profiles/mini"),
    )
    head, _, body = text.partition("\r\n\r\n")
    assert "200 OK" in head and "content-type: text/event-stream" in head
    assert body.startswith("retry: 2000\n\n")
    found = events_of(body)
    assert [name for _, name, _ in found] == ["boat"] * (len(found) - 2) + ["figures", "close"]
    whole = found[-1][2]
    assert [data for _, name, data in found if name == "boat"] == whole["boats"]
    assert isinstance(whole["boats"], list) and whole["boats"]
    assert [int(number.rpartition(".")[2]) for number, _, _ in found] == list(range(1, len(found) + 1))
    assert found[-2][2]["usage"]["completion_tokens"] > 0


async def test_failed_streams_end_with_an_error_event_or_begin_with_a_status(served: Served) -> None:
    async with client(served, accept="text/event-stream") as http:
        answer = await http.post("/profiles/slow", json={"input": "many", "max_tokens": 60, "seed": 1})
        if answer.status_code == 200:
            *items, (_, name, data) = events_of(answer.text)
            assert (name, data["code"], data["metadata"]["try_max_tokens"]) == ("error", "structured_answer_cut", "120")
            assert {event for _, event, _ in items} <= {"boat"}
        else:
            assert answer.json()["error"]["code"] == "structured_answer_cut"
        assert (await http.post("/profiles/nothing", json={"input": "x"})).status_code == 404
        wrong = {"input.weather": {"input": {"harbour": "x", "weather": "fog"}}, "boats": {"input": "x", "boats": 1}}
        wrong |= {"forbid": {"input": "x", "forbid": ["kanji"]}, "language": {"input": "x", "language": "fr"}}
        wrong |= {"input": {"input": [1]}, "retries": {"input": "x", "retries": 9}, "text": {"input": "x", "text": "y"}}
        for param, body in wrong.items():
            answer = await http.post("/profiles/mini", json=body)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text
    failures = served.platform.registry.get_sample_value
    assert failures(
        "loraline_inference_structured_failures_total", {"shape": "json_schema", "reason": "STRUCTURED_ANSWER_CUT"}
    )


async def test_a_lost_stream_is_taken_up_again_by_its_owner_only(served: Served) -> None:
    body = {"input": "many", "seed": 2, "max_tokens": 2000}
    async with client(served, accept="text/event-stream") as http:
        seen = ""
        async with http.stream("POST", "/profiles/slow", json=body) as response:
            async for text in response.aiter_text():
                seen += text
                if len(events_of(seen)) >= 3:
                    break
        last = events_of(seen)[2][0]
        async with client(served, key="ben") as other:
            stolen = await other.post("/profiles/slow", headers={"last-event-id": last})
            assert (stolen.status_code, stolen.json()["error"]["code"]) == (404, "stream_gone")
        rest = await http.post("/profiles/slow", headers={"last-event-id": last})
        found = [*events_of(seen)[:3], *events_of(rest.text)]
        assert [int(number.rpartition(".")[2]) for number, _, _ in found] == list(range(1, len(found) + 1))
        assert found[-1][1] == "close", found[-1]
        assert [data for _, name, data in found if name == "boat"] == found[-1][2]["boats"]
        assert len(found[-1][2]["boats"]) == 300
        ended = await http.get("/profiles/slow", headers={"last-event-id": found[-1][0]})
        assert ended.status_code == 204
        await asyncio.sleep(3.5)  # profile_reconnect_seconds is 3
        gone = await http.post("/profiles/slow", headers={"last-event-id": last})
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "stream_gone")


async def test_a_stream_beyond_the_most_is_refused_with_a_time_to_come_back(served: Served) -> None:
    async with contextlib.AsyncExitStack() as open_streams:
        http = await open_streams.enter_async_context(client(served, accept="text/event-stream"))
        body = {"input": "many", "max_tokens": 2000}
        asking = [http.stream("POST", "/profiles/slow", json=body) for _ in range(8)]  # profile_max_streams
        answers = await asyncio.gather(*(open_streams.enter_async_context(one) for one in asking))
        assert [answer.status_code for answer in answers] == [200] * 8
        full = await http.post("/profiles/mini", json={"input": "x"})
        assert (full.status_code, full.json()["error"]["code"]) == (429, "streams_full")
        assert full.headers["retry-after"] == "1"
        # A plain answer needs no stream.
        plain = await http.post("/profiles/nothing", json={"input": "x"}, headers={"accept": "application/json"})
        assert plain.status_code == 404
    await until(lambda: served.metric("loraline_inference_in_flight_requests") == 0, "the slots to be free", 60)


async def test_a_profile_answers_in_a_session(served: Served) -> None:
    async with client(served) as http:
        session = (await http.post("/sessions", json={"model": "toy", "system_prompt": "Short."})).json()["name"]
        body = {"input": "a boat", "session": session, "seed": 4, "max_tokens": 400}
        first = await http.post("/profiles/mini", json=body)
        assert first.status_code == 200, first.text
        kept = (await http.get(f"/sessions/{session}")).json()["messages"]
        assert [message["role"] for message in kept] == ["user", "assistant"]
        assert "a boat" in kept[0]["content"]
        whole = json.loads(kept[1]["content"])
        assert isinstance(whole["boats"], list)
        async with client(served, accept="text/event-stream") as streaming:
            found = events_of((await streaming.post("/profiles/mini", json={**body, "input": "and now"})).text)
        assert found[-1][1] == "close", found[-1]
        # The second turn was asked after the first: what it says is kept, its prompt is longer.
        kept = (await http.get(f"/sessions/{session}")).json()["messages"]
        assert [message["role"] for message in kept] == ["user", "assistant"] * 2
        assert json.loads(kept[3]["content"]) == found[-1][2]
        assert found[-2][2]["usage"]["prompt_tokens"] > first.json()["usage"]["prompt_tokens"]
        stolen = await http.post("/profiles/mini", json={**body, "session": "sessions/nobodys"})
        assert stolen.status_code in {400, 404}


async def test_a_stream_nobody_comes_back_to_frees_its_slot(served: Served) -> None:
    body = {"input": "many", "max_tokens": 2000}
    async with (
        client(served, accept="text/event-stream") as http,
        http.stream("POST", "/profiles/slow", json=body) as response,
    ):
        async for _ in response.aiter_text():
            break
    await until(lambda: served.metric("loraline_inference_in_flight_requests") == 0, "the slot to be free", 60)


async def test_shapes_by_the_openai_client(served: Served) -> None:
    api = openai.AsyncOpenAI(base_url=f"{served.http}/v1", api_key=served.keys["anna"], max_retries=0)
    messages: Any = [{"role": "user", "content": "Boats?"}]
    boat = {"type": "string", "minLength": 1, "maxLength": 5}
    schema = {"type": "object", "properties": {"a": boat}, "required": ["a"], "additionalProperties": False}

    async def said(text: Any = messages, **parameters: Any) -> Any:
        answer = await api.chat.completions.create(model="toy", messages=text, max_tokens=100, seed=3, **parameters)
        return answer.choices[0]

    shaped: Any = {"type": "json_schema", "json_schema": {"name": "boat", "schema": schema}}
    assert set(json.loads((await said(response_format=shaped)).message.content)) == {"a"}
    for body in ({"structured_outputs": {"choice": ["yes", "no"]}}, {"guided_choice": ["yes", "no"]}):
        assert (await said(extra_body=body)).message.content in ("yes", "no")
    assert (await said(extra_body={"guided_regex": "[0-9]{4}"})).message.content.isdigit()
    assert (await said(extra_body={"structured_outputs": {"grammar": 'root ::= "aye" | "nay"'}})).message.content in (
        "aye",
        "nay",
    )
    assert set(json.loads((await said(extra_body={"guided_json": json.dumps(schema)})).message.content)) == {"a"}
    korean = (await said(extra_body={"language": "ko", "forbid": ["latin", "digits", "emoji"]})).message.content
    assert spoken(korean, "ko", "latin", "digits", "emoji")
    followed = (await said([{"role": "user", "content": "오늘 날씨?"}], extra_body={"language": "question"})).message
    assert spoken(followed.content, "ko")
    # A cut answer is OpenAI's own `length`, unless whole answers only were asked for.
    endless = {"type": "object", "properties": {"a": {**boat, "minLength": 900, "maxLength": 999}}, "required": ["a"]}
    long: Any = {"type": "json_schema", "json_schema": {"name": "boat", "schema": endless}}
    assert (await said(response_format=long, stop=None)).finish_reason == "length"
    with pytest.raises(openai.APIStatusError) as caught:
        await said(response_format=long, extra_body={"retries": 0})
    assert caught.value.code == "structured_answer_cut"


async def test_bad_shapes_over_http_name_the_field(served: Served) -> None:
    wrong: dict[str, Any] = {
        "response_format.json_schema.schema": {
            "response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "x"}}}
        },
        "response_format": {"response_format": {"type": "yaml"}},
        "guided_regex": {"guided_regex": "(("},
        "guided_json": {"guided_json": "{"},
        "structured_outputs.grammar": {"structured_outputs": {"grammar": "root ::= x"}},
        "structured_outputs.tag": {"structured_outputs": {"tag": 1}},
        "structured_outputs": {"structured_outputs": {"regex": "a", "choice": ["a"]}},
        "guided_choice": {"guided_choice": ["a"], "response_format": {"type": "json_object"}},
        "language": {"language": "fr"},
        "forbid": {"forbid": "emoji"},
        "retries": {"retries": 6},
    }
    async with client(served) as http:
        for param, body in wrong.items():
            asked = {"model": "toy", "messages": [{"role": "user", "content": "x"}], **body}
            answer = await http.post("/chat/completions", json=asked)
            assert (answer.status_code, answer.json()["error"]["param"]) == (400, param), answer.text


async def test_200_of_200_are_valid_or_typed_errors(served: Served, request: Any) -> None:
    """Random weights say anything; what arrives is a valid answer or a typed error, and both are counted."""
    many = "vllm" in request.node.name
    asked = [
        ("challenge", 700, {}),
        ("challenge", 120, {}),
        ("commands", 400, {}),
        ("extract", 300, {}),
        ("mini", 160, {}),
    ]
    profiles, outcomes = Profiles.load(None), Counter[str]()
    gate = asyncio.Semaphore(32)

    async def one(number: int, name: str, limit: int) -> None:
        body = {
            "input": "오늘은 바다에 갑니다. What shall I do?",
            "max_tokens": limit,
            "temperature": 1.0,
            "seed": number,
        }
        async with gate:
            answer = await http.post(f"/profiles/{name}", json={**body, "retries": 0})
        content = answer.json()
        if answer.status_code != 200:
            assert content["error"]["code"] in TYPED, content
            outcomes[content["error"]["code"]] += 1
            return
        outcomes["ok"] += 1
        if name != "mini":
            profile = profiles.get(name)
            rule = rule_of(profile.language.answer, profile.language.forbid, "")
            shape = shape_of(Constraint("json_schema", profile.answer), rule)
            assert shape is not None and shape.problem(json.dumps(content["answer"])) is None

    async with client(served) as http:
        chosen = [asked[number % len(asked)] for number in range(200)] if many else [("mini", 100, {})] * 6
        await asyncio.gather(*(one(number, name, limit) for number, (name, limit, _) in enumerate(chosen)))
    print(f"outcomes: {dict(outcomes)}")
    assert outcomes.total() == len(chosen)
    assert outcomes["ok"] and (outcomes["structured_answer_cut"] or not many)
    assert served.metric("loraline_inference_in_flight_requests") == 0


async def test_retries_ask_again_and_are_counted(served: Served) -> None:
    request = ask(max_tokens=3, temperature=1.0)
    request.structured.regex = "[a-z]{200,}"
    request.structured.retries = 2
    before = served.metric("loraline_inference_structured_retries_total", reason="STRUCTURED_ANSWER_CUT")
    error = await refused(served.chat(request))
    assert error.reason == "STRUCTURED_ANSWER_CUT"
    after = served.metric("loraline_inference_structured_retries_total", reason="STRUCTURED_ANSWER_CUT")
    assert after == before + 2


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ("profile", "- a"),
        ("profile", "a: ["),
        ("answer", "name: x\ndescription: d"),
        ("Name", "Name: x\nname: x\ndescription: d\nanswer: {type: object}"),
        ("name", "name: X y\ndescription: d\nanswer: {type: object}"),
        ("answer.type", "name: x\ndescription: d\nanswer: {type: array}"),
        ("answer", "name: x\ndescription: d\nanswer: {type: object, properties: {a: {type: strin}}}"),
        ("language.answer", "name: x\ndescription: d\nanswer: {type: object}\nlanguage: {answer: fr}"),
        ("language.forbid", "name: x\ndescription: d\nanswer: {type: object}\nlanguage: {forbid: [kanji]}"),
        ("stream.field", "name: x\ndescription: d\nanswer: {type: object}\nstream: {field: a, event: b}"),
        ("input", "name: x\ndescription: d\nanswer: {type: object}\ninput: {free_text: false}"),
        ("sampling.max_tokens", "name: x\ndescription: d\nanswer: {type: object}\nsampling: {max_tokens: 0}"),
    ],
)
async def test_wrong_profile_files_name_file_and_field(field: str, text: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(LoralineError) as caught:
        Profiles.load(tmp_path)
    assert caught.value.reason == "PROFILE_INVALID"
    assert "wrong.yaml" in caught.value.message
    assert list(caught.value.fields) == [field]
    with pytest.raises(LoralineError, match="no folder"):
        Profiles.load(tmp_path / "missing")


async def test_a_profile_of_ones_own_replaces_a_built_in_one(tmp_path: Path) -> None:
    text = "name: extract\ndescription: mine\nanswer: {type: object}"
    (tmp_path / "mine.yaml").write_text(text, encoding="utf-8")
    assert Profiles.load(tmp_path).get("extract").description == "mine"
    (tmp_path / "twice.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(LoralineError, match=r"mine\.yaml"):
        Profiles.load(tmp_path)
