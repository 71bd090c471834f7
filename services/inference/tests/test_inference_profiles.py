"""Response profiles and shaped answers behind a real server and real engines, over gRPC, HTTP and raw SSE bytes."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import jsonschema_rs
import openai
import pytest
import pytest_asyncio
from served_profiles import client, curl, events_of, prompts_told, spoken, widened, write_profiles
from served_toy import Served, ask, refused, served_toy

from loraline.api.inference.v1 import inference_pb2 as pb
from loraline.core.testing.waiting import until
from loraline.inference.profiles.profile import Profile
from loraline.inference.profiles.registry import Profiles
from loraline.inference.structured.shape import texts_of

pytestmark = [pytest.mark.asyncio(loop_scope="module"), pytest.mark.timeout(900)]
JSON_OBJECT = {"type": "json_object"}
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
    before = served.metric("loraline_inference_profile_answers_total", profile="mini", outcome="ok")
    pieces = await served.chat(request)
    assert served.metric("loraline_inference_profile_answers_total", profile="mini", outcome="ok") == before + 1
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
                    # Boats come while the model still writes: it has some 300 to write.
                    assert served.metric("loraline_inference_in_flight_requests") == 1
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


def right(profile: Profile, answer: Any) -> bool:
    """Tell by the schema alone, and by the letters of its texts, whether an answer is what the profile asks."""
    whole = jsonschema_rs.validator_for(profile.answer).is_valid(answer)
    korean = profile.language.answer != "ko" or not re.search(r"[A-Za-z0-9#*_`~<>🌀-🫿]", " ".join(texts_of(answer)))
    return whole and korean


async def test_200_of_200_are_valid_or_typed_errors(served: Served, request: Any) -> None:
    """Random weights say anything; what arrives is a valid answer or a typed error, as JSON and as events."""
    many = "vllm" in request.node.name
    limits = {"challenge": 2000, "commands": 1200, "extract": 1200, "mini": 160, "cut": 120} if many else {"mini": 160}
    profiles: Profiles = served.component.extra["profiles"]
    outcomes: Counter[tuple[str, str, str]] = Counter()
    gate, streams = asyncio.Semaphore(32), asyncio.Semaphore(8)  # profile_max_streams

    async def one(number: int, which: str, how: str) -> None:
        name = "challenge" if which == "cut" else which
        body = {"input": "오늘은 바다에 갑니다. What shall I do?", "max_tokens": limits[which], "temperature": 1.0}
        body |= {"seed": number, "retries": 0}
        async with gate, streams if how == "events" else contextlib.nullcontext():
            accept = "text/event-stream" if how == "events" else "application/json"
            answer = await http.post(f"/profiles/{name}", json=body, headers={"accept": accept})
        if answer.status_code != 200:
            code = answer.json()["error"]["code"]
        elif how == "json":
            assert right(profiles.get(name), answer.json()["answer"])
            code = "ok"
        else:
            found = events_of(answer.text)
            _, last, data = found[-1]
            code = {"close": "ok", "error": data.get("code")}[last]
            stream = profiles.get(name).stream
            items = [item for _, event, item in found if stream and event == stream.event]
            if stream and code == "ok":
                assert right(profiles.get(name), data) and items == data[stream.field]
        assert code in {"ok", *TYPED}, answer.text
        outcomes[which, how, code] += 1

    async with client(served) as http:
        hows = ("json", "events")
        chosen = [(which, how) for which in limits for how in hows] * (20 if many else 3)
        await asyncio.gather(*(one(number, *asked) for number, asked in enumerate(chosen)))
    print(f"outcomes: {dict(outcomes)}")
    assert outcomes.total() == len(chosen) == (200 if many else 6)
    for which, how in set(chosen):
        assert outcomes[which, how, "ok" if which != "cut" else "structured_answer_cut"] >= 1, (which, how)
    # Its slot is free a moment after an answer's last event.
    await until(lambda: served.metric("loraline_inference_in_flight_requests") == 0, "the slots to be free", 60)


BASICS = {"location": "바닷가 마을", "work_type": "집에서", "category": "걷기"}
BASICS_AS_ASKED = "사는 곳: 바닷가 마을\n일하는 방식: 집에서\n챌린지 분야: 걷기"
IN_WORDS = "바닷가 마을에 살고 집에서 일해요. 걷기 챌린지를 추천해 주세요."


async def test_challenges_of_basics_and_of_words_in_a_session(
    served: Served, request: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile, prompts = served.component.extra["profiles"].get("challenge"), prompts_told(served, monkeypatch)

    async def one(given: Any, words: str, how: str) -> None:
        session = (await http.post("/sessions", json={"category": "걷기", "system_prompt": "다정하게 말해라."})).json()
        body = {"input": given, "session": session["name"], "max_tokens": 2000, "seed": 5, "retries": 3}
        headers = {"accept": "text/event-stream" if how == "events" else "application/json"}
        answer = await http.post("/profiles/challenge", json=body, headers=headers)
        assert answer.status_code == 200, answer.text
        if how == "events":
            *items, (_, figures, _), (_, close, whole) = events_of(answer.text)
            assert {name for _, name, _ in items} == {"challenge"} and (figures, close) == ("figures", "close")
            assert [item for _, _, item in items] == whole["challenges"]
        else:
            whole = answer.json()["answer"]
        assert right(profile, whole) and 1 <= len(whole["challenges"]) <= 3
        kept = (await http.get(f"/sessions/{session['name']}")).json()
        assert kept["category"] == "걷기"
        assert [(message["role"], message["content"]) for message in kept["messages"][:1]] == [("user", words)]
        assert json.loads(kept["messages"][1]["content"]) == whole

    asked = [(given, words, how) for how in ("events", "json") for given, words in (
        (BASICS, BASICS_AS_ASKED), (IN_WORDS, IN_WORDS)
    )]  # fmt: skip
    if "vllm" not in request.node.name:
        asked = asked[:1]  # seconds each where one answer does not run beside the other
    async with client(served) as http:
        await asyncio.gather(*(one(*each) for each in asked))
    for _, words, _ in asked:
        told = next(prompt for prompt in prompts if words in prompt)
        assert "다정하게 말해라." in told and profile.system_prompt in told
        assert told.count("<|im_start|>system") == 1


PAGE = "<html><body><h1>Mareva's boats</h1><p>Price: <b>12 pearls</b></p></body></html>"
WANTED = {"document": PAGE, "wanted": "title, price"}
ORDER = {"instruction": "Scout goes to the pier, the ferry waits 5 minutes.", "agents": "scout, ferry"}


@pytest.mark.parametrize(
    ("name", "given", "words", "event", "field"),
    [
        ("extract", WANTED, f"Document: {WANTED['document']}\nFields: title, price", "field", "fields"),
        ("commands", ORDER, f"Instruction: {ORDER['instruction']}\nAgents: scout, ferry", "command", "commands"),
    ],
)
async def test_what_is_extracted_and_commanded_comes_item_by_item(
    served: Served, name: str, given: Any, words: str, event: str, field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    profile, prompts = served.component.extra["profiles"].get(name), prompts_told(served, monkeypatch)
    item = jsonschema_rs.validator_for(profile.answer["properties"][field]["items"])
    body = {"input": given, "max_tokens": 700, "temperature": 1.0, "retries": 0}
    async with client(served, accept="text/event-stream") as http:
        answers = await asyncio.gather(*(http.post(f"/profiles/{name}", json={**body, "seed": n}) for n in range(4)))
    items = 0
    for answer in answers:  # random weights may write on until they are cut
        if answer.status_code != 200:
            assert answer.json()["error"]["code"] in TYPED
            continue
        *found, (_, last, data) = events_of(answer.text)
        told = [content for _, kind, content in found if kind == event]
        assert all(item.is_valid(content) for content in told)
        assert data[field] == told if last == "close" else (last, data["code"]) == ("error", "structured_answer_cut")
        items += len(told)
    assert items >= 1
    assert len(prompts) == 4
    assert all(
        f"<|im_start|>user\n{words}<|im_end|>" in prompt and profile.system_prompt in prompt for prompt in prompts
    )


async def test_json_only_is_an_object_or_a_typed_error(served: Served) -> None:
    shaped = ask(max_tokens=1500, temperature=1.0)
    shaped.structured.json_only, shaped.structured.retries = True, 5
    told = "".join(piece.delta for piece in await served.chat(shaped))
    assert isinstance(json.loads(told), dict), told
    shaped.sampling.max_tokens, shaped.structured.retries = 1, 0
    error = await refused(served.chat(shaped))
    assert (error.reason, error.metadata["try_max_tokens"]) == ("STRUCTURED_ANSWER_CUT", "2")
    body = {"model": "toy", "messages": [{"role": "user", "content": "Boats?"}], "response_format": JSON_OBJECT}
    async with client(served) as http:
        whole = (await http.post("/chat/completions", json={**body, "max_tokens": 1500, "retries": 5})).json()
        assert isinstance(json.loads(whole["choices"][0]["message"]["content"]), dict), whole
        cut = await http.post("/chat/completions", json={**body, "max_tokens": 1, "retries": 0})
        assert (cut.status_code, cut.json()["error"]["code"]) == (400, "structured_answer_cut")
        plain = (await http.post("/chat/completions", json={**body, "max_tokens": 1})).json()
        assert plain["choices"][0]["finish_reason"] == "length"  # as OpenAI has it, where nothing was said of retries


async def test_retries_ask_again_and_are_counted(served: Served) -> None:
    request = ask(max_tokens=3, temperature=1.0)
    request.structured.regex = "[a-z]{200,}"
    request.structured.retries = 2
    before = served.metric("loraline_inference_structured_retries_total", reason="STRUCTURED_ANSWER_CUT")
    error = await refused(served.chat(request))
    assert error.reason == "STRUCTURED_ANSWER_CUT"
    after = served.metric("loraline_inference_structured_retries_total", reason="STRUCTURED_ANSWER_CUT")
    assert after == before + 2
