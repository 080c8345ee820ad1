"""Pictures, sounds and videos in chat messages, by the official client; the limits of where they come from."""

import base64
import os

import openai
import pytest
from running import file_server, picture, sound, video

QUESTION = {"type": "text", "text": "What is this?"}


def data_uri(kind, data):
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


PICTURE = {"type": "image_url", "image_url": {"url": data_uri("image/png", picture())}}
SOUND = {"type": "input_audio", "input_audio": {"data": base64.b64encode(sound()).decode(), "format": "wav"}}


def ask(client, content, **options):
    messages = [{"role": "user", "content": content}]
    return client.chat.completions.create(
        **{"model": "default", "messages": messages, "max_tokens": 6, "temperature": 0, **options}
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A host with a picture, a sound and a video on it, and redirects."""
    folder = tmp_path_factory.mktemp("host")
    (folder / "flower.jpg").write_bytes(picture("JPEG"))
    (folder / "birds.ogg").write_bytes(sound(file_format="OGG"))
    (folder / "clip.mp4").write_bytes(video())
    (folder / "page.html").write_text("<p>no picture</p>")
    redirects = {"/moved.jpg": "/flower.jpg", "/inside.jpg": "http://localhost:1/flower.jpg", "/round": "/round"}
    with file_server(folder, redirects) as host:
        yield host


@pytest.fixture(scope="module")
def open_server(demo, files):
    """A server that takes media from that host."""
    from running import started, stopped

    server = started(demo, allowed_hosts=frozenset([files]))
    yield server
    stopped(server)


def test_the_calls_that_mistral_rs_documents(open_server, files, model):
    """Word for word as its documentation of Gemma 3n has them, but for the hosts of the URLs."""
    client = openai.OpenAI(api_key="foobar", base_url=f"{open_server.url}/v1/")
    url = f"http://{files}/flower.jpg"
    completion = client.chat.completions.create(
        model="ignore",
        messages=[
            {
                "role": "user",
                "content": [
                    {
                        "type": "image_url",
                        "image_url": {
                            "url": url,
                        },
                    },
                    {
                        "type": "text",
                        "text": "Please describe this image in detail.",
                    },
                ],
            },
        ],
        max_tokens=256,
        frequency_penalty=1.0,
        top_p=0.1,
        temperature=0,
    )
    assert completion.model == "tiny"
    assert completion.usage.prompt_tokens > model.config.vision.soft_tokens
    assert completion.choices[0].message.content
    audio_url, image_url = f"http://{files}/birds.ogg", url
    completion = client.chat.completions.create(
        model="ignore",
        messages=[
            {
                "role": "user",
                "content": [
                    {
                        "type": "audio_url",
                        "audio_url": {"url": audio_url},
                    },
                    {
                        "type": "image_url",
                        "image_url": {"url": image_url},
                    },
                    {
                        "type": "text",
                        "text": "Describe in detail what is happening.",
                    },
                ],
            },
        ],
        max_tokens=256,
        frequency_penalty=1.0,
        top_p=0.1,
        temperature=0,
    )
    assert completion.choices[0].finish_reason in ("stop", "length")
    soft_tokens = model.config.vision.soft_tokens + model.config.audio.soft_tokens
    assert completion.usage.prompt_tokens > soft_tokens


def test_the_order_of_parts_is_kept(client, model):
    contents = [[PICTURE, SOUND, QUESTION], [SOUND, PICTURE, QUESTION], [QUESTION, PICTURE, "and", SOUND]]
    for content in contents:
        mine = [
            {"type": "image", "image": picture()}
            if part is PICTURE
            else {"type": "audio", "audio": sound()}
            if part is SOUND
            else part
            for part in content
        ]
        expected = model.generate([{"role": "user", "content": mine}], max_tokens=6, temperature=0.0)
        answer = ask(client, content)
        assert answer.choices[0].message.content == expected.text
        assert answer.usage.prompt_tokens == expected.usage.prompt_tokens


def test_every_way_to_write_a_source(open_server, files):
    client = open_server.openai()
    ways = [
        {"type": "image_url", "image_url": data_uri("image/jpeg", picture("JPEG"))},
        {"type": "image_url", "image_url": {"url": f"http://{files}/flower.jpg", "detail": "high"}},
        {"type": "image_url", "image_url": f"http://{files}/moved.jpg"},
    ]
    answers = {ask(client, [part, QUESTION]).choices[0].message.content for part in ways}
    assert len(answers) == 1
    tokens = [
        ask(client, [{"type": "video_url", "video_url": url}, QUESTION]).usage.prompt_tokens
        for url in (f"http://{files}/clip.mp4", {"url": data_uri("video/mp4", video())})
    ]
    assert tokens[0] == tokens[1] > ask(client, [QUESTION]).usage.prompt_tokens


def test_an_earlier_pictures_tokens_come_from_the_cache(client):
    first = [{"role": "user", "content": [PICTURE, QUESTION]}]
    answer = client.chat.completions.create(model="default", messages=first, max_tokens=4, temperature=0)
    again = [{"role": "user", "content": [PICTURE, {"type": "text", "text": "Is it red?"}]}]
    usage = client.chat.completions.create(model="default", messages=again, max_tokens=4).usage
    assert usage.prompt_tokens_details.cached_tokens > 9
    second = [*first, {"role": "assistant", "content": answer.choices[0].message.content}]
    second += [{"role": "user", "content": "Thanks"}]
    usage = client.chat.completions.create(model="default", messages=second, max_tokens=4).usage
    assert usage.prompt_tokens_details.cached_tokens >= answer.usage.prompt_tokens
    other = {"type": "image_url", "image_url": {"url": data_uri("image/png", picture(colour=(20, 90, 250)))}}
    usage = client.chat.completions.create(
        model="default", messages=[{"role": "user", "content": [other, QUESTION]}], max_tokens=4
    ).usage
    assert usage.prompt_tokens_details.cached_tokens < 9  # the placeholders are alike, the pictures are not


@pytest.mark.parametrize(
    ("part", "words"),
    [
        ({"type": "image_url", "image_url": {"url": "http://127.0.0.1:9/a.png"}}, "private address"),
        ({"type": "image_url", "image_url": {"url": "http://localhost:9/a.png"}}, "private address"),
        ({"type": "audio_url", "audio_url": {"url": "http://169.254.169.254/latest"}}, "private address"),
        ({"type": "image_url", "image_url": {"url": "http://[::ffff:10.0.0.1]/a.png"}}, "private address"),
        ({"type": "image_url", "image_url": {"url": "http://2130706433/a.png"}}, "private address"),
        ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "not allowed"),
        ({"type": "image_url", "image_url": {"url": "/etc/passwd"}}, "not allowed"),
        ({"type": "image_url", "image_url": {"url": "ftp://example.org/a.png"}}, "scheme"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,bm8gcGljdHVyZQ=="}}, "not an image"),
        ({"type": "image_url", "image_url": {"url": ""}}, "'image_url' is .*expected"),
        ({"type": "image_url"}, "image_url"),
        ({"type": "input_audio", "input_audio": {"data": "no base64", "format": "wav"}}, "base64"),
        ({"type": "input_audio", "input_audio": {"data": "", "format": "wav"}}, "no bytes"),
        ({"type": "video_url", "video_url": {"url": PICTURE["image_url"]["url"]}}, "."),
        ({"type": "image", "path": "/etc/passwd"}, "unknown"),
    ],
)
def test_media_that_are_refused(client, part, words):
    with pytest.raises(openai.BadRequestError, match=words) as refused:
        ask(client, [part, QUESTION])
    assert refused.value.param == "messages"
    assert "root:" not in refused.value.message


def test_a_redirect_leads_to_no_private_host(open_server, files):
    client = open_server.openai()
    for path, words in (
        ("inside.jpg", "private"),
        ("round", "redirects"),
        ("gone.jpg", "404"),
        ("page.html", "not an image"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            ask(client, [{"type": "image_url", "image_url": {"url": f"http://{files}/{path}"}}])


def test_local_paths_lie_below_the_media_root(serve, tmp_path):
    root, outside = tmp_path / "media", tmp_path / "outside.png"
    root.mkdir()
    (root / "red.png").write_bytes(picture())
    outside.write_bytes(picture())
    os.symlink(outside, root / "link.png")
    client = serve(paths=root).openai()
    for url in ("red.png", str(root / "red.png"), f"file://{root / 'red.png'}"):
        ask(client, [{"type": "image_url", "image_url": {"url": url}}])
    for url in ("../outside.png", str(outside), f"file://{outside}", "link.png", "red.png/../../outside.png"):
        with pytest.raises(openai.BadRequestError, match="does not lie below"):
            ask(client, [{"type": "image_url", "image_url": {"url": url}}])


def test_sizes_are_limited(serve):
    client = serve(max_pixels=2000, max_seconds=0.3, max_bytes=20000).openai()
    for part, words in ((PICTURE, "pixels"), (SOUND, "longer than")):
        with pytest.raises(openai.BadRequestError, match=words):
            ask(client, [part])
    big = {"type": "image_url", "image_url": {"url": data_uri("image/png", bytes(30000))}}
    with pytest.raises(openai.BadRequestError, match="bytes"):
        ask(client, [big])


def test_how_many_media_one_request_may_bring(client):
    for content, words in (
        ([PICTURE] * 129, "the media cost 129"),
        ([SOUND] * 9, "the media cost 144"),
        (["a"] * 257, "at most 256"),
    ):
        with pytest.raises(openai.BadRequestError, match=words):
            ask(client, content)


def test_the_other_backend_serves_too(serve, client):
    pytest.importorskip("mlx.core")
    answer, other = (ask(one, [PICTURE, SOUND, QUESTION]) for one in (serve(backend="mlx").openai(), client))
    assert answer.usage.prompt_tokens == other.usage.prompt_tokens
    assert answer.usage.completion_tokens > 0
