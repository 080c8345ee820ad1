"""Drafts on the server: the same text with them and without, what usage and metrics count, and how they are refused."""

import openai
import pytest

KEYS = ("the_name_of_the_first_shape", "the_name_of_the_second_shape", "how_many_of_them_there_are")
SCHEMA = {
    "type": "object",
    "properties": {key: {"enum": ["one", "two"]} for key in KEYS},
    "required": list(KEYS),
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "shapes", "schema": SCHEMA}}
HELLO = [{"role": "user", "content": "Hello"}]


def ask(client, **options):
    body = {"messages": HELLO, "max_tokens": 90, "temperature": 1, "seed": 1, "response_format": FORMAT, **options}
    return client.chat.completions.create(model="default", **body)


def predictions(answer):
    details = answer.usage.completion_tokens_details
    return details.accepted_prediction_tokens, details.rejected_prediction_tokens


def test_a_schema_is_drafted_unless_the_request_forbids_it(server, client):
    before = server.figure("accepted_tokens_total")
    drafted, plain = ask(client), ask(client, extra_body={"draft": False})
    assert drafted.choices[0].message.content == plain.choices[0].message.content
    assert drafted.usage.completion_tokens == plain.usage.completion_tokens
    accepted, rejected = predictions(drafted)
    assert accepted > 15
    assert rejected >= 0
    assert predictions(plain) == (0, 0)
    assert server.figure("accepted_tokens_total") == before + accepted
    assert server.figure("drafted_tokens_total") >= before + accepted + rejected
    both = ask(client, extra_body={"draft": True}, n=2)
    assert both.choices[0].message.content == plain.choices[0].message.content


def test_a_stream_of_drafted_tokens_has_a_chunk_for_each(client):
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    plain = ask(client, extra_body={"draft": False})
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == plain.choices[0].message.content
    assert predictions(chunks[-1])[0] > 15


def test_completions_take_the_field_too(client):
    options = {"model": "default", "prompt": "a b c a b c a b", "max_tokens": 20, "temperature": 0}
    found = [client.completions.create(**options, extra_body={"draft": draft}) for draft in (False, True)]
    assert found[0].choices[0].text == found[1].choices[0].text
    assert predictions(found[0]) == (0, 0)


def test_a_server_without_drafts_makes_none_for_any_request(serve):
    server = serve(draft="off")
    answer = ask(server.openai(), extra_body={"draft": True})
    assert predictions(answer) == (0, 0)
    assert answer.usage.completion_tokens > 15


def test_a_slice_may_draft_for_the_whole_model(serve, client):
    """What it drafts is seldom worth its time here; the text is the same, and other slices answer as ever."""
    server = serve(draft="half", slices=["half-skip"])
    with server.http() as http:
        for name in ("tiny", "tiny:half-skip"):
            body = {"model": name, "messages": HELLO, "max_tokens": 20, "temperature": 0}
            drafted, plain = (
                http.post("/v1/chat/completions", json={**body, "draft": d}).json() for d in (True, False)
            )
            assert drafted["choices"] == plain["choices"]


def test_a_draft_that_is_no_yes_or_no_is_a_400(client):
    with pytest.raises(openai.BadRequestError, match="draft"):
        ask(client, extra_body={"draft": "e9b"})
