"""eval: its figures against slow plain computations, one column a variant, and failures of one line."""

import base64
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import wave
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from devices import device_for

from g3n_mlx import load
from g3n_mlx.checkpoint.hub import demo_folder
from g3n_mlx.convert import convert
from g3n_mlx.eval.__main__ import main
from g3n_mlx.eval.quality import errors, read_examples, says, windows, word_errors

TEXT = "The cat sat on the mat.\nDie Katze saß auf der Matte, 猫はマットに座った。\n"
HEADER = "name,# Layers,# Effective Params (B),MMLU PT accuracy,FFN Hidden Dims,Layers Skipped\n"
QUESTIONS = {
    "text": "What is two and two?",
    "image": [{"type": "image", "image": "media/noise.png"}, {"type": "text", "text": "What is this?"}],
    "audio": [{"type": "audio", "audio": "media/noise.wav"}, {"type": "text", "text": "Who speaks?"}],
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    folder = tmp_path_factory.getbasetemp() / "eval_cache"
    monkeypatch.setattr("g3n_mlx.convert.cache_folder", lambda: folder)


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("slices") / "own.csv"
    path.write_text(HEADER + f'Half,10,,,"{[128] * 10}",\n')
    return path


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def media(tmp_path_factory):
    """A folder for examples, with a picture and a sound below it."""
    pil = pytest.importorskip("PIL.Image")
    folder = tmp_path_factory.mktemp("examples")
    (folder / "media").mkdir()
    noise = np.random.default_rng(0)
    pil.fromarray(noise.integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(folder / "media" / "noise.png")
    with wave.open(str(folder / "media" / "noise.wav"), "wb") as file:
        file.setparams((1, 2, 16_000, 0, "NONE", ""))
        file.writeframes(noise.integers(-9000, 9000, 8000, dtype=np.int16).tobytes())
    return folder


@pytest.fixture(scope="module")
def stopping_folder(tiny_folder, media, tmp_path_factory):
    """The tiny checkpoint, made to end its babble soon: the fourth token of each question's answer is an end."""
    folder = tmp_path_factory.mktemp("stopping") / "tiny"
    shutil.copytree(tiny_folder, folder)
    model = load(folder, dtype="float32", device="cpu")
    ends = {model.generate(messages(media, kind), temperature=0.0, max_tokens=4).token_ids[-1] for kind in QUESTIONS}
    generation = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**generation, "eos_token_id": sorted(ends)}))
    return folder


def messages(folder, kind):
    """A question whose media have absolute paths."""
    content = json.loads(json.dumps(QUESTIONS[kind]).replace("media/", f"{folder.as_posix()}/media/"))
    return [{"role": "user", "content": content}]


def write_examples(path, *entries):
    lines = [
        json.dumps(
            {"skill": skill, "metric": metric, "answer": answer, "messages": [{"role": "user", "content": asked}]}
        )
        for skill, metric, answer, asked in entries
    ]
    path.write_text("\n".join(lines) + "\n\n", encoding="utf-8")
    return path


def evaluate(capsys, *flags):
    code = main([*map(str, flags)])
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def figures(capsys, tmp_path, *flags):
    code, out, err = evaluate(capsys, *flags, "--json", tmp_path / "figures.json")
    assert code == 0, err
    return out, json.loads((tmp_path / "figures.json").read_text(encoding="utf-8"))


def test_answers_of_text_image_and_audio(backend, stopping_folder, media, tmp_path, capsys):
    model = load(stopping_folder, backend=backend, dtype="float32", device=device_for(backend))
    said = {kind: model.generate(messages(media, kind), temperature=0.0, max_tokens=40).text for kind in QUESTIONS}
    assert all(text.strip() for text in said.values()), said
    uri = "data:image/png;base64," + base64.b64encode((media / "media" / "noise.png").read_bytes()).decode()
    entries = [
        ("right", "exact", f"  {said['text'].upper()}\n", QUESTIONS["text"]),
        ("mixed", "exact", said["image"], QUESTIONS["image"]),
        ("mixed", "exact", said["image"], [{"type": "image_url", "image_url": {"url": uri}}, "What is this?"]),
        ("mixed", "exact", said["audio"] + "!", QUESTIONS["audio"]),
        ("words", "wer", said["audio"] + " one two", QUESTIONS["audio"]),
    ]
    path = write_examples(media / f"{backend}.jsonl", *entries)
    flags = ("--model", stopping_folder, "--backend", backend, "--dtype", "float32", "--device", "cpu")
    out, found = figures(capsys, tmp_path, *flags, "--examples", path)
    (column,) = found["variants"]
    assert column["answers"] == [said["text"], said["image"], said["image"], said["audio"], said["audio"]]
    words = len(said["audio"].split()) + 2
    assert column["rates"] == pytest.approx({"right": 1.0, "mixed": 2 / 3, "words": 2 / words})
    assert column["mean_score"] == pytest.approx((1 + 2 / 3 + 1 - 2 / words) / 3)
    assert found["skills"][1] == {"skill": "mixed", "metric": "exact", "count": 3}
    assert re.search(r"^mixed, accuracy of 3 +66\.7%$", out, re.MULTILINE)
    assert re.search(rf"^words, word error rate of 1 +{2 / words:.1%}$", out, re.MULTILINE)

    _, found = figures(capsys, tmp_path, *flags, "--examples", path, "--limit", 1)
    assert [skill["count"] for skill in found["skills"]] == [1, 1, 1]
    assert len(found["variants"][0]["answers"]) == 3
    assert found["asked"][1] == {"where": f"{path}, line 2", "skill": "mixed", "answer": said["image"]}


def test_a_draft_is_said_exactly_when_it_is_what_would_be_decoded(backend, stopping_folder, media):
    """Up to the end: shorter, longer and other drafts are not."""
    model = load(stopping_folder, backend=backend, dtype="float32", device=device_for(backend))
    for kind in QUESTIONS:
        prompt = model.prepare(messages(media, kind))
        said = list(model.generate(prompt, temperature=0.0, max_tokens=40).token_ids)
        assert len(said) > 1
        assert says(model, prompt, said)
        other = said[-1] + 1 if said[-1] + 1 not in model.eos_token_ids else said[-1] + 2
        for draft in (said[:-1], [*said, said[-1]], [*said[:-1], other], []):
            assert not says(model, prompt, draft)


def test_a_column_for_every_combination(stopping_folder, table, backends, tmp_path, capsys, monkeypatch):
    if len(backends) < 2:
        pytest.skip("one backend alone is installed")
    monkeypatch.setenv("COLUMNS", "200")
    folder = tmp_path / "model"
    shutil.copytree(stopping_folder, folder)
    write_examples(folder / "sample.jsonl", ("sums", "exact", "four", QUESTIONS["text"]))
    flags = ("--backend", "torch", "--backend", "mlx", "--dtype", "float32", "--device", "cpu", "--q-bits", 4)
    out, found = figures(
        capsys, tmp_path, "--model", folder, *flags, "--matformer", "half", "--matformer-config", table
    )
    columns = found["variants"]
    assert [(column["backend"], column["q_bits"], column["matformer"]) for column in columns] == [
        (backend, bits, name) for backend in ("torch", "mlx") for bits in (None, 4) for name in (None, "half")
    ]
    heads = [line.split() for line in out.splitlines()[2:5]]
    assert heads[0] == ["torch"] * 4 + ["mlx"] * 4
    assert heads[2] == ["whole", "half"] * 4
    # Backends agree in float32, and the share is that of the same variant's answers.
    assert [column["same_answers"] for column in columns[:4]] == [None] * 4
    assert [column["same_answers"] for column in columns[4:]] == [
        float(ours["answers"] == theirs["answers"]) for ours, theirs in zip(columns[4:], columns[:4], strict=True)
    ]
    assert columns[4]["answers"] == columns[0]["answers"]
    sizes = [column["weight_bytes_per_token"] for column in columns]
    assert sizes[:4] == sizes[4:]
    assert sizes[0] > sizes[1] > sizes[3]
    assert sizes[0] > sizes[2] > sizes[3]


def test_both_backends_every_slice_and_quantized_models(tiny_folder, table, text_file, backends, tmp_path, capsys):
    """`all` is each model's own slices that fit it; what is quantized already is taken as it is."""
    if len(backends) < 2:
        pytest.skip("one backend alone is installed")
    small = convert(tiny_folder, tmp_path / "small", q_bits=4, progress=False)
    half = convert(tiny_folder, tmp_path / "half", matformer="half", matformer_config=table, progress=False)
    own = tmp_path / "own"
    shutil.copytree(tiny_folder, own)
    shutil.copy(table, own / "matformer.csv")
    code, _, err = evaluate(capsys, "--model", small, "--text", text_file, "--q-bits", 4)
    assert code == 1
    assert "quantized already" in err
    code, _, err = evaluate(capsys, "--model", half, "--text", text_file, "--matformer", "all")
    assert code == 1

    flags = ["--q-bits", 8, "--matformer", "all", "--backend", "both", "--text", text_file, "--device", "cpu"]
    flags += ["--dtype", "float32", "--markdown"]
    out, found = figures(capsys, tmp_path, "--model", own, "--model", small, "--model", half, *flags)
    columns = [(Path(c["model"]).name, c["backend"], c["q_bits"], c["matformer"]) for c in found["variants"]]
    assert columns == [
        *(("own", backend, *rest) for backend in ("mlx", "torch") for rest in product_of([None, 8], [None, "half"])),
        *(("small", backend, None, None) for backend in ("mlx", "torch")),
        *(("half", backend, bits, None) for backend in ("mlx", "torch") for bits in (None, 8)),
    ]
    # A slice taken at load and the same slice written are one model; backends agree.
    by_name = dict(zip(columns, found["variants"], strict=True))
    taken, written = by_name["own", "torch", None, "half"], by_name["half", "torch", None, None]
    assert taken["weight_bytes"] == written["weight_bytes"] < by_name["own", "torch", None, None]["weight_bytes"]
    assert taken["perplexity"] == pytest.approx(written["perplexity"], rel=1e-5)
    assert by_name["own", "mlx", None, None]["kl_mean"] is None
    assert by_name["own", "torch", None, None]["kl_mean"] < 1e-6 < by_name["own", "torch", 8, None]["kl_mean"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()[2:]]
    assert {len(row) for row in rows} == {1 + len(columns)}
    assert rows[0][2] == "own, mlx, as stored, half"
    assert rows[1] == ["---"] + ["---:"] * len(columns)


def product_of(first, second):
    return [(a, b) for a in first for b in second]


def test_columns_beyond_the_width_stand_below(stopping_folder, tmp_path, capsys, monkeypatch):
    path = write_examples(tmp_path / "a.jsonl", ("sums", "exact", "4", "2 + 2"))
    flags = ("--model", stopping_folder, "--examples", path, "--dtype", "float32", "--dtype", "bfloat16")
    blocks = {}
    for width in (60, 200):
        monkeypatch.setenv("COLUMNS", str(width))
        code, out, err = evaluate(capsys, *flags, "--q-bits", 8)
        assert code == 0, err
        assert max(map(len, out.splitlines()[2:])) <= width
        blocks[width] = [block.splitlines() for block in out.strip().split("\n\n")[1:]]
    assert len(blocks[200]) == 1
    assert len(blocks[60]) > 1
    label = len("mean of accuracies, 1 - error rates")
    joined = [
        "".join(row[label:] if place else row for place, row in enumerate(rows))
        for rows in zip(*blocks[60], strict=True)
    ]
    assert joined == blocks[200][0]


def log_softmax(logits):
    wide = logits.astype(np.float64)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))


@pytest.mark.parametrize(("window", "stride"), [(4096, None), (24, 7)])
def test_perplexity_and_divergence(backend, tiny_folder, text_file, table, window, stride, tmp_path, capsys):
    """Against whole logits and one window a token: each is predicted from the window that counts it."""
    flags = ["--model", tiny_folder, "--backend", backend, "--dtype", "float32", "--device", "cpu"]
    flags += ["--matformer", "half", "--matformer-config", table, "--text", text_file, "--window-tokens", window]
    flags += [] if stride is None else ["--stride-tokens", stride]
    out, found = figures(capsys, tmp_path, *flags)

    options = {"backend": backend, "dtype": "float32", "device": "cpu"}
    models = [load(tiny_folder, **options), load(tiny_folder, matformer="half", matformer_config=table, **options)]
    ids = models[0].tokenizer.encode(TEXT)
    assert found["tokens"] == len(ids) > 48
    assert found["bytes"] == len(TEXT.encode())
    logprobs = [np.empty((len(ids), model.config.text.vocab_size)) for model in models]
    for place in range(len(ids)):
        # A window holds `window - 1` tokens behind bos; the second one ends `stride` further, and so on.
        end = window - 1
        while place >= end:
            end += stride
        prompt = [models[0].tokenizer.bos_id, *ids[max(0, min(end, len(ids)) - window + 1) : place]]
        for model, rows in zip(models, logprobs, strict=True):
            rows[place] = log_softmax(model.logits(prompt)[-1])
    whole, half = logprobs
    for rows, column in zip(logprobs, found["variants"], strict=True):
        loss = -rows[np.arange(len(ids)), ids]
        assert column["perplexity"] == pytest.approx(np.exp(loss.mean()), rel=1e-3)
        assert column["perplexity_per_byte"] == pytest.approx(np.exp(loss.sum() / len(TEXT.encode())), rel=1e-3)
    divergence = (np.exp(whole) * (whole - half)).sum(-1)
    first, second = found["variants"]
    assert [first[name] for name in ("kl_mean", "kl_p99", "same_top1")] == [None] * 3
    assert second["kl_mean"] == pytest.approx(divergence.mean(), rel=1e-3)
    error = divergence.std() / np.sqrt(len(ids))
    assert second["kl_error"] == pytest.approx(error, rel=1e-3)
    assert second["kl_p99"] == pytest.approx(np.quantile(divergence, 0.99), rel=1e-3)
    assert second["same_top1"] == pytest.approx((whole.argmax(-1) == half.argmax(-1)).mean(), abs=1.5 / len(ids))
    assert f"{second['kl_mean']:.3g}" in out


def test_a_reference_of_its_own(tiny_folder, text_file, tmp_path, capsys):
    """The same model elsewhere: nothing diverges from it."""
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    _, found = figures(capsys, tmp_path, "--model", tiny_folder, "--against", copy, "--text", text_file)
    assert [column["model"] for column in found["variants"]] == [str(copy), str(tiny_folder)]
    assert found["variants"][1]["kl_mean"] == found["variants"][1]["kl_p99"] == 0.0
    assert found["variants"][1]["same_top1"] == 1.0
    assert found["variants"][1]["perplexity"] == found["variants"][0]["perplexity"]


def test_examples_diverge_from_a_reference(tiny_folder, quantized_folder, tmp_path, capsys):
    """Over the tokens of every expected answer and its end, as a plain computation has it."""
    examples = tmp_path / "examples.jsonl"
    asked = [("What is this?", "A red circle."), ("Hello", "Hi there, how are you?")]
    examples.write_text(
        "\n".join(
            json.dumps({"skill": "s", "metric": "exact", "answer": a, "messages": [{"role": "user", "content": q}]})
            for q, a in asked
        )
    )
    flags = ("--model", quantized_folder, "--against", tiny_folder, "--examples", examples, "--dtype", "float32")
    out, found = figures(capsys, tmp_path, *flags)
    first, second = found["variants"]
    assert [first[name] for name in ("kl_mean", "kl_error", "kl_p99", "same_top1")] == [None] * 4
    rows = []
    for folder in (tiny_folder, quantized_folder):
        model = load(folder, dtype="float32")
        some = []
        for question, answer in asked:
            prompt, truth = model.prepare(question), model.tokenizer.encode(answer)
            logits = model.logits([*prompt.token_ids, *truth]).astype(np.float64)
            some.append(logits[len(prompt.token_ids) - 1 :])
        logits = np.concatenate(some)
        rows.append(logits - np.log(np.exp(logits).sum(axis=1, keepdims=True)))
    theirs, ours = rows
    divergence = (np.exp(theirs) * (theirs - ours)).sum(axis=1)
    assert second["kl_mean"] == pytest.approx(divergence.mean(), rel=1e-3)
    assert second["kl_p99"] == pytest.approx(np.quantile(divergence, 0.99), rel=1e-3)
    assert second["same_top1"] == pytest.approx((theirs.argmax(1) == ours.argmax(1)).mean())
    assert f"{second['kl_mean']:.3g}" in out
    _, found = figures(capsys, tmp_path, "--model", quantized_folder, "--examples", examples, "--dtype", "float32")
    assert found["variants"][0]["kl_mean"] is None


def test_logit_chunks_are_the_logits(backend, tiny_folder):
    model = load(tiny_folder, backend=backend, dtype="float32", device=device_for(backend))
    ids = [2, *range(100, 160)]
    chunks = list(model.logit_chunks(ids, 7, 16))
    assert [len(chunk) for chunk in chunks] == [16, 16, 16, 6]
    np.testing.assert_allclose(np.concatenate(chunks), model.logits(ids)[7:], rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["examples", "text"])
def test_plot(kind, stopping_folder, text_file, tmp_path, capsys):
    if importlib.util.find_spec("matplotlib") is None:
        pytest.skip("matplotlib is not installed")
    path = write_examples(tmp_path / "a.jsonl", ("sums", "exact", "4", "2 + 2")) if kind == "examples" else text_file
    code, _, err = evaluate(capsys, "--model", stopping_folder, f"--{kind}", path, "--plot", tmp_path / "plot.png")
    assert code == 0, err
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("answer", "truth", "count"),
    [
        ("one two three", "one two three", 0),
        ("one three", "one two three", 1),  # one left out
        ("one or two three", "one two three", 1),  # one too many
        ("one to three", "one two three", 1),  # another one
        ("", "one two three", 3),
        ("three one two", "one two three", 2),  # moved: out here, in there
        ("a b c d e", "x", 5),
    ],
)
def test_word_errors(answer, truth, count):
    assert word_errors(answer.split(), truth.split()) == count


def test_case_and_white_space_do_not_count():
    assert errors("exact", " Blue Square\n", "blue square ") == (0, 1)
    assert errors("exact", "blue  square", "blue square") == (1, 1)
    assert errors("wer", "One,  two", "one, TWO three") == (1, 3)


@pytest.mark.parametrize(("length", "size", "stride"), [(1, 5, 2), (5, 5, 2), (6, 5, 5), (100, 7, 3), (101, 7, 7)])
def test_windows_count_every_token_once(length, size, stride):
    spans = list(windows(length, size, stride))
    assert [place for _, first, stop in spans for place in range(first, stop)] == list(range(length))
    for start, first, stop in spans:
        assert 0 <= start <= first < stop
        assert stop - start == min(size, length)


GOOD = {"skill": "s", "metric": "exact", "answer": "a", "messages": [{"role": "user", "content": "q"}]}
PICTURE = [{"role": "user", "content": [{"type": "image", "image": "../none.png"}]}]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: is not JSON"),
        ("[" * 100_000, "line 2: is not JSON"),
        ("[]", "line 2: is a list"),
        (json.dumps({**GOOD, "answer": 4}), "line 2: 'answer' is 4, expected a str"),
        (json.dumps({**GOOD, "answer": " "}), "line 2: the answer is empty"),
        (json.dumps({**GOOD, "metric": "bleu"}), "line 2: the metric is 'bleu', expected one of exact, wer"),
        (json.dumps({**GOOD, "metric": "wer"}), "line 2: the metric of skill 's' is 'wer', and was 'exact' before"),
        (json.dumps({**GOOD, "messages": [{"role": "judge", "content": "q"}]}), "line 2: messages[0] has the role"),
        (json.dumps({**GOOD, "messages": PICTURE}), "line 2: messages[0].content[0]: "),
    ],
)
def test_bad_examples_are_one_line(line, message, stopping_folder, tmp_path, capsys):
    path = tmp_path / "bad.jsonl"
    path.write_text(f"{json.dumps(GOOD)}\n{line}\n")
    code, out, err = evaluate(capsys, "--model", stopping_folder, "--examples", path)
    assert (code, out) == (1, "")
    assert len(err.splitlines()) == 1, err
    assert err.startswith("g3n-eval: ")
    assert f"{path}, {message}" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "no-such-folder", "--text", "TEXT"), "no-such-folder"),
        (("--limit", 0), "expected at least 1"),
        (("--limit", 3, "--text", "TEXT"), "--limit is of no use with --text"),
        (("--stride-tokens", 3), "--stride-tokens is of no use without --text"),
        (("--text", "no-such.txt"), "no-such.txt"),
        (("--text", "TEXT", "--window-tokens", 1), "--window-tokens is 1"),
        (("--text", "TEXT", "--window-tokens", 40000), "--window-tokens is 40000"),
        (("--text", "TEXT", "--window-tokens", 8, "--stride-tokens", 8), "--stride-tokens is 8, expected 1 to 7"),
        (("--text", "TEXT", "--json", "no/such/folder.json"), "there is no folder"),
        (("--text", "TEXT", "--plot", "plot.txt"), "expected a name that ends in .png"),
        (("--text", "TEXT", "--matformer-config", "x.csv"), "--matformer-config needs --matformer"),
        (("--text", "no-such.txt", "--matformer", "E9B"), "E9B"),  # before anything is read
        (("--text", "TEXT", "--device", "mps"), "mps"),
    ],
)
def test_failures_are_one_line(flags, message, tiny_folder, text_file, capsys):
    named = () if "--model" in flags else ("--model", tiny_folder)
    code, out, err = evaluate(capsys, *named, *(text_file if flag == "TEXT" else flag for flag in flags))
    assert (code, out) == (1, "")
    complaint = err.splitlines()
    assert len(complaint) == 1
    assert complaint[0].startswith("g3n-eval: ")
    assert message in complaint[0]


@pytest.mark.parametrize(
    "flags", [("--limit", "x"), ("--text", "a", "--examples", "b"), ("--dtype", "int8"), ("--q-bits", "7")]
)
def test_bad_flags_are_usage_errors(flags, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(list(flags))
    assert stopped.value.code == 2
    assert "usage:" in capsys.readouterr().err


def test_another_tokenizer_can_not_be_compared(tiny_folder, text_file, tmp_path, capsys):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_folder, copy)
    tokenizer = json.loads((copy / "tokenizer.json").read_text())
    tokenizer["model"]["merges"] = []
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    code, _, err = evaluate(capsys, "--model", tiny_folder, "--model", copy, "--text", text_file)
    assert code == 1
    assert "has another tokenizer" in err


@pytest.mark.parametrize("content", [b"", b"\xff\xfe"])
def test_a_text_that_is_none(content, tiny_folder, tmp_path, capsys):
    (tmp_path / "text.txt").write_bytes(content)
    code, _, err = evaluate(capsys, "--model", tiny_folder, "--text", tmp_path / "text.txt")
    assert code == 1
    assert "text.txt is " in err


def test_a_model_without_a_sample_needs_examples(stopping_folder, tmp_path, capsys):
    folder = tmp_path / "model"
    shutil.copytree(stopping_folder, folder, ignore=shutil.ignore_patterns("sample.jsonl"))
    code, _, err = evaluate(capsys, "--model", folder)
    assert code == 1
    assert "sample.jsonl does not exist: give --examples FILE or --text FILE" in err


@pytest.mark.parametrize("of_slices", [False, True])
def test_the_embedded_model_keeps_its_quality(of_slices, backends, tmp_path, capsys):
    """On its own sample, no worse than tests/demo_sample/floors.json asks for: nothing, while it is not trained.

    Both backends are asked for the whole model; that slices compute alike in both is tested elsewhere.
    """
    floors = json.loads((Path(__file__).parents[1] / "demo_sample" / "floors.json").read_text(encoding="utf-8"))
    sample = read_examples(demo_folder() / "sample.jsonl")
    counts = Counter(example.skill for example in sample)
    assert len(counts) >= 10
    assert min(counts.values()) >= 10
    rates = floors.get("rates", {"whole": {}})
    slices = [name for name in rates if name != "whole"] if of_slices else []
    if of_slices and not slices:
        pytest.skip("no floors for slices")
    flags = [flag for backend in (backends[-1:] if of_slices else backends) for flag in ("--backend", backend)]
    flags += [flag for name in slices for flag in ("--matformer", name)] + ([] if floors else ["--limit", 1])
    _, found = figures(capsys, tmp_path, "--model", "demo", "--device", "cpu", *flags)
    assert [skill["skill"] for skill in found["skills"]] == list(counts)
    metrics = {skill["skill"]: skill["metric"] for skill in found["skills"]}
    worse = []
    for column in found["variants"]:
        for skill, bound in rates[column["matformer"] or "whole"].items():
            rate = column["rates"][skill]
            if rate > bound if metrics[skill] == "wer" else rate < bound:
                worse.append((column["backend"], column["matformer"], skill, rate, bound))
        if floors and not of_slices and column["same_answers"] is not None:
            assert column["same_answers"] >= floors["same_answers"]
    assert not worse


@pytest.mark.parametrize("inline", [True, False])
def test_held_out_examples_can_be_asked(inline, repository, tiny_folder, tmp_path, capsys):
    """What examples/train_demo/write_examples.py writes, media in files or in the lines, out of a cache of noise."""
    for package in ("soundfile", "soxr", "PIL"):
        pytest.importorskip(package)
    noise = np.random.default_rng(0).integers(-9000, 9000, 16_000, dtype=np.int16)
    np.save(tmp_path / "held_out.npy", noise)
    entries = [("shape", "red circle", 0, 9000), ("digits", "1 2", 9000, 16_000)]
    (tmp_path / "held_out.json").write_text(json.dumps(entries))
    script = repository / "examples" / "train_demo" / "write_examples.py"
    output = tmp_path / ("examples.jsonl" if inline else "examples")
    flags = [output, "--count", 2, "--speech", tmp_path, "--skills", "sums", "counts", "digits", "both"]
    done = subprocess.run([sys.executable, script, *map(str, flags)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = output if inline else output / "examples.jsonl"
    examples = read_examples(path)
    assert [example.skill for example in examples] == [
        s for s in ("sums", "counts", "digits", "both") for _ in range(2)
    ]
    assert {example.metric for example in examples if example.skill == "digits"} == {"wer"}
    assert inline == (not (output / "media").exists())
    _, found = figures(capsys, tmp_path, "--model", tiny_folder, "--examples", path, "--limit", 1)
    assert [skill["count"] for skill in found["skills"]] == [1] * 4


def test_a_small_text_is_said_to_mean_little(tiny_folder, tmp_path, capsys):
    path = tmp_path / "small.txt"
    path.write_text("a few words")
    assert main(["--model", str(tiny_folder), "--text", str(path)]) == 0
    assert " tokens are few, and chance decides" in capsys.readouterr().err


def test_paths_that_can_not_be_read_or_written_are_named(tiny_folder, tmp_path, capsys):
    model = ["--model", str(tiny_folder)]
    for flags, words in (
        (["--text", str(tmp_path / "no.txt")], f"{tmp_path / 'no.txt'}: no such file or directory"),
        (["--examples", str(tmp_path)], f"{tmp_path} is a folder: give --examples FILE or --text FILE"),
        (["--json", str(tmp_path)], f"{tmp_path} is a folder, expected the name of a file to write"),
    ):
        assert main([*model, *flags]) == 1
        assert capsys.readouterr().err == f"g3n-eval: {words}\n"


def test_a_place_that_can_not_be_written_to_is_said_before_the_work(tiny_folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)
    assert main(["--model", str(tiny_folder), "--json", str(tmp_path / "a.json")]) == 1
    assert capsys.readouterr().err == f"g3n-eval: {tmp_path / 'a.json'} can't be written: permission denied\n"
