"""`g3n batch` on the embedded model: the answers that a server would give, resumed, and as tables."""

import base64
import csv
import json

import pytest

from g3n_mlx import load
from g3n_mlx.batch.__main__ import main
from g3n_mlx.batch.results import text_of

MODEL = ["--model", "demo", "--backend", "torch", "--dtype", "float32"]
CHAT, AUDIO = "/v1/chat/completions", "/v1/audio/transcriptions"


@pytest.fixture
def media(repository):
    return repository / "examples" / "media"


def chat(custom_id, content, **options):
    body = {"messages": [{"role": "user", "content": content}], "temperature": 0, **options}
    return {"custom_id": custom_id, "method": "POST", "url": CHAT, "body": body}


def image(url, text):
    return [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]


def written(path, lines):
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return str(path)


def results(path):
    return {line["custom_id"]: line for line in map(json.loads, path.read_text("utf-8").splitlines())}


def batch(*arguments):
    return main([*map(str, arguments), *MODEL])


def test_every_kind_of_request(tmp_path, media, capsys, caplog):
    data = f"data:image/png;base64,{base64.b64encode((media / 'shapes.png').read_bytes()).decode()}"
    spoken = {"file_url": str(media / "digits.ogg")}
    requests = [
        chat("sum", "What is 12 + 34?", model="gpt-4o"),
        chat("path", image(str(media / "shapes.png"), "How many circles are there?")),
        chat("data", image(data, "How many circles are there?")),
        chat("file", image((media / "shapes.png").as_uri(), "How many circles are there?")),
        {"custom_id": "plain", "url": "/v1/completions", "body": {"prompt": "Hello", "max_tokens": 3}},
        {"custom_id": "spoken", "url": AUDIO, "body": spoken},
        {"custom_id": "srt", "url": AUDIO, "body": {**spoken, "response_format": "srt"}},
        {"custom_id": "silent", "url": AUDIO, "body": {"file_url": "no.ogg"}},
        {"custom_id": "nameless", "url": AUDIO, "body": {"file": "no.ogg"}},
        chat("gone", image("no.png", "What?")),
        chat("wrong", "Hello", max_tokens="many"),
        "{broken",
    ]
    output = tmp_path / "results.jsonl"
    assert batch(written(tmp_path / "requests.jsonl", requests), "-o", output) == 0
    found = results(output)
    texts = {name: text_of(line) for name, line in found.items() if line["error"] is None}
    one_circle = "A red circle (1) and a blue square: there is 1 circle."
    assert texts.pop("plain")
    assert texts.pop("srt").startswith("1\n00:00:00,000 --> 00:00:0")
    assert texts == {"sum": "12 + 34 = 46", "spoken": "3 1 4", **dict.fromkeys(("path", "data", "file"), one_circle)}
    messages = {name: line["error"]["message"] for name, line in found.items() if line["error"]}
    assert messages.keys() == {"silent", "nameless", "gone", "wrong", "line-12"}
    assert messages["silent"] == "'no.ogg' does not exist"
    assert "no.png" in messages["gone"]
    assert messages["wrong"].startswith("max_tokens: ")
    assert found["sum"]["response"]["body"]["model"] == "demo"
    assert {line["response"]["status_code"] for line in found.values()} == {200, 400}
    assert "requests name the model 'gpt-4o': demo answers them" in caplog.messages
    told = capsys.readouterr().err
    assert "12 results in" in told
    assert "5 failed: --retry-errors runs them again" in told


def test_each_answer_is_what_it_would_be_alone(tmp_path):
    prompts = [f"What is {i} + {3 * i}?" for i in range(12)]
    requests = [chat(str(i), prompt, temperature=0.8, seed=i, max_tokens=9) for i, prompt in enumerate(prompts)]
    output = tmp_path / "results.jsonl"
    batch(written(tmp_path / "requests.jsonl", requests), "-o", output, "--parallel", 5)
    with load("demo", backend="torch", dtype="float32") as model:
        alone = [model.generate(text, temperature=0.8, seed=i, max_tokens=9).text for i, text in enumerate(prompts)]
    assert [text_of(results(output)[str(i)]) for i in range(12)] == alone


def test_a_second_run_does_what_is_left_and_retries_what_failed(tmp_path, media, capsys):
    requests, output = tmp_path / "requests.jsonl", tmp_path / "results.jsonl"
    later = tmp_path / "later.png"
    lines = [chat("a", "Hello", max_tokens=2), chat("b", image(str(later), "What is this?"), max_tokens=2)]
    batch(written(requests, lines), "-o", output)
    first = results(output)
    assert first["b"]["error"]
    later.write_bytes((media / "shapes.png").read_bytes())
    batch(written(requests, [*lines, chat("c", "Hello", max_tokens=2)]), "-o", output)
    second = results(output)
    assert [second["a"], second["b"]] == [first["a"], first["b"]]
    assert second["c"]["error"] is None
    capsys.readouterr()
    batch(requests, "-o", output, "--retry-errors")
    assert "1 of 1 requests done" in capsys.readouterr().err
    third = results(output)
    assert third["a"] == first["a"]
    assert third["b"]["error"] is None
    batch(requests, "-o", output, "--retry-errors")
    assert "requests done" not in capsys.readouterr().err


def test_files_a_schema_and_tables(tmp_path, media, capsys):
    pytest.importorskip("pyarrow")
    import pyarrow.parquet

    schema = {"type": "object", "properties": {"n": {"type": "integer", "maximum": 9}, "text": {"enum": ["x"]}}}
    schema |= {"required": ["n", "text"], "additionalProperties": False}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    asked = ["--files", str(media / "*.png"), str(media / "*.mp4"), broken, "-p", "How many?", "--temperature", 0]
    asked += ["--schema", tmp_path / "schema.json", "-o"]
    batch(*asked, tmp_path / "table.csv")
    batch(*asked, tmp_path / "table.parquet")
    assert "going on from 4 results" in capsys.readouterr().err
    with (tmp_path / "table.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    same = pyarrow.parquet.read_table(tmp_path / "table.parquet").to_pylist()
    assert [row["custom_id"] for row in same] == [row["custom_id"] for row in rows]
    assert same[0].keys() == rows[0].keys()
    assert len(rows) == len(results(tmp_path / "table.jsonl")) == 4
    for row in rows:
        if row["custom_id"] == str(broken):
            assert "not an image" in row["error"]
            assert row["text"] == row["n"] == ""
        else:
            assert json.loads(row["text"]) == {"n": int(row["n"]), "text": row["answer.text"]}
            assert int(row["completion_tokens"]) > 0


@pytest.mark.slow
def test_a_thousand_mixed_requests_of_which_two_percent_are_broken(tmp_path, media):
    def request(i):
        if i % 50 == 0:
            return ["{broken", chat(str(i), image("no.png", "What?")), chat(str(i), "x", top_p="y")][i // 50 % 3]
        if i % 10 == 1:
            return chat(str(i), image(str(media / "shapes.png"), f"What is in picture {i}?"), max_tokens=6)
        if i % 50 == 2:
            return {"custom_id": str(i), "url": AUDIO, "body": {"file_url": str(media / "digits.ogg")}}
        return chat(str(i), f"What is {i} + {i}?", max_tokens=6)

    output = tmp_path / "results.jsonl"
    assert batch(written(tmp_path / "requests.jsonl", map(request, range(1000))), "-o", output) == 0
    assert len(output.read_text("utf-8").splitlines()) == 1000
    assert sum(line["error"] is not None for line in results(output).values()) == 20


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a file of requests, or --files"),
        (["r.jsonl", "--files", "a.jpg", "-p", "x"], "give a file of requests, or --files"),
        (["--files", "a.jpg"], "--files and --prompt go together"),
        (["r.jsonl", "-p", "x"], "--files and --prompt go together"),
        (["r.jsonl", "--max-tokens", "5"], "--max-tokens is for --files"),
    ],
)
def test_flags_that_do_not_go_together(arguments, message, capsys):
    with pytest.raises(SystemExit):
        main([*arguments, "-o", "out.jsonl"])
    assert message in capsys.readouterr().err


def test_what_is_wrong_is_told_before_the_model_loads(tmp_path, capsys):
    requests = written(tmp_path / "requests.jsonl", [chat("a", "Hello")])
    with pytest.raises(SystemExit):
        main([requests, "-o", "out.txt"])
    assert main([requests, "-o", str(tmp_path / "no" / "out.jsonl"), "--model", "no/model"]) == 1
    assert main([requests, "-o", requests, "--model", "no/model"]) == 1
    assert main([str(tmp_path / "none.jsonl"), "-o", str(tmp_path / "out.jsonl"), "--model", "no/model"]) == 1
    told = capsys.readouterr().err
    assert "which holds the requests" in told
    assert "none.jsonl: no such file" in told
    assert "no/model" not in told
