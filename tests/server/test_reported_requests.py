"""Requests that real clients sent and that were answered wrongly once: reported_requests.jsonl, as they came."""

import json
from pathlib import Path

import httpx
import pytest

LINES = Path(__file__).with_name("reported_requests.jsonl").read_text("utf-8").splitlines()
REQUESTS = [json.loads(line) for line in LINES]


def text(response: httpx.Response) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]["message"]["content"]


def refusal(response: httpx.Response) -> str:
    assert response.status_code == 400, response.text
    return response.json()["error"]["message"]


def answers_46(response: httpx.Response, media_root: Path) -> None:
    assert "46" in text(response)


def names_the_images(response: httpx.Response, media_root: Path) -> None:
    assert "messages[0].images" in refusal(response)


def follows_the_schema(response: httpx.Response, media_root: Path) -> None:
    if response.status_code == 400:
        assert "schema" in refusal(response)
        return
    answer = json.loads(text(response))
    assert list(answer) == ["zz"]
    assert isinstance(answer["zz"], bool)


def continues(response: httpx.Response, media_root: Path) -> None:
    if response.status_code == 400:
        assert "continue_final_message" in refusal(response)
        return
    assert text(response).removeprefix("12 + 34").strip().startswith("= 46")


def hides_the_folder(response: httpx.Response, media_root: Path) -> None:
    message = refusal(response)
    assert "nope.png" in message
    assert str(media_root) not in message


def answers(response: httpx.Response, media_root: Path) -> None:
    assert text(response)


CHECKS = (answers_46, answers_46, names_the_images, follows_the_schema, continues, hides_the_folder, answers)


@pytest.mark.parametrize(
    ("request_", "check"), list(zip(REQUESTS, CHECKS, strict=True)), ids=lambda x: getattr(x, "__name__", "")
)
def test_a_reported_request_is_answered_as_its_line_says(serve, tmp_path, request_, check):
    server = serve(paths=tmp_path)
    with server.http() as client:
        check(client.post(request_["path"], json=request_["body"]), tmp_path)
