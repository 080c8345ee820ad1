"""Completions, scoring, token routes and the table of models, by the official client over a socket."""

import numpy as np
import openai
import pytest

TEXTS = ["The cat sat on the mat.", "Hello there"]


def complete(client, prompt=TEXTS[0], **options):
    return client.completions.create(
        **{"model": "default", "prompt": prompt, "max_tokens": 6, "temperature": 0, **options}
    )


def ids_of(model, text):
    return [model.tokenizer.bos_id, *model.tokenizer.encode(text)]


def test_text_and_ids(client, model):
    for text in TEXTS:
        expected = model.generate(ids_of(model, text), max_tokens=6, temperature=0.0)
        answer = complete(client, text)
        assert answer.object == "text_completion"
        assert answer.choices[0].text == expected.text
        assert answer.choices[0].finish_reason == expected.finish_reason
        assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
        assert complete(client, ids_of(model, text)).choices[0].text == expected.text


def test_batches_and_choices(client):
    answer = complete(client, TEXTS, n=2, temperature=1, seed=5)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert answer.choices[0].text == complete(client, TEXTS[0], temperature=1, seed=5).choices[0].text
    assert answer.choices[2].text == complete(client, TEXTS[1], temperature=1, seed=5).choices[0].text
    chunks = list(complete(client, TEXTS, n=2, temperature=1, seed=5, stream=True))
    for choice in answer.choices:
        pieces = [c.choices[0] for c in chunks if c.choices[0].index == choice.index]
        assert "".join(piece.text for piece in pieces) == choice.text
        assert pieces[-1].finish_reason == choice.finish_reason


def test_scores_are_those_of_the_logits(client, model):
    """echo with max_tokens 0, what evaluation tools score answers with."""
    for text in TEXTS:
        ids = ids_of(model, text)
        logits = model.logits(ids).astype(np.float64)[:-1]
        logits -= logits.max(axis=-1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        choice = complete(client, text, max_tokens=0, echo=True, logprobs=2).choices[0]
        found = choice.logprobs
        assert choice.text == text
        assert choice.finish_reason == "length"
        assert found.token_logprobs[0] is None
        assert found.top_logprobs[0] is None
        expected = logprobs[np.arange(len(ids) - 1), ids[1:]]
        np.testing.assert_allclose(found.token_logprobs[1:], expected, atol=2e-5)
        for top, row in zip(found.top_logprobs[1:], logprobs, strict=True):
            assert max(top.values()) == pytest.approx(row.max(), abs=2e-5)
        assert len(found.tokens) == len(found.text_offset) == len(ids)
        for token, offset in list(zip(found.tokens, found.text_offset, strict=True))[1:]:
            assert text[offset : offset + len(token)] == token


def test_echo_before_an_answer(client):
    plain, echoed = complete(client, logprobs=1), complete(client, logprobs=1, echo=True)
    scored = complete(client, max_tokens=0, echo=True, logprobs=1)
    assert echoed.choices[0].text == TEXTS[0] + plain.choices[0].text
    both = scored.choices[0].logprobs.token_logprobs + plain.choices[0].logprobs.token_logprobs
    assert echoed.choices[0].logprobs.token_logprobs == both
    streamed = list(complete(client, logprobs=1, echo=True, stream=True))
    assert "".join(chunk.choices[0].text for chunk in streamed) == echoed.choices[0].text
    pieces = [chunk.choices[0].logprobs.token_logprobs for chunk in streamed if chunk.choices[0].logprobs]
    assert [value for piece in pieces for value in piece] == both
    assert complete(client, max_tokens=0, echo=True).choices[0].text == TEXTS[0]


def test_an_end_has_an_entry_where_scores_are_asked_for(client, model):
    """Evaluation tools cut off the last entry: without one for the end they would lose the prompt's last token."""
    end = min(model.eos_token_ids)
    choice = complete(client, max_tokens=1, echo=True, logprobs=1, logit_bias={str(end): 100}).choices[0]
    scored = complete(client, max_tokens=0, echo=True, logprobs=1).choices[0].logprobs
    assert choice.text == TEXTS[0]
    assert choice.finish_reason == "stop"
    assert choice.logprobs.token_logprobs[:-1] == scored.token_logprobs
    assert choice.logprobs.tokens[-1] == model.tokenizer.decode([end], skip_special=False)


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"suffix": "end"}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"prompt": [99999999]}, "prompt"),
        ({"prompt": []}, None),
        ({"best_of": 5}, "best_of"),
        ({"prompt": ["a"] * 200, "n": 2}, "prompt"),
        ({"prompt": "no " * 33000}, "prompt"),
    ],
)
def test_what_is_refused(client, options, param):
    with pytest.raises(openai.BadRequestError) as refused:
        complete(client, **options)
    if param:
        assert refused.value.param == param


def test_a_multiple_choice_task(client, model):
    """What lm_eval's local-completions does: the answer whose tokens are likeliest wins; as our own scoring has it."""
    rng = np.random.default_rng(0)
    last = min(1000, model.tokenizer.vocab_size)
    for _ in range(4):
        question = [model.tokenizer.bos_id, *rng.integers(200, last, 12).tolist()]
        options = [rng.integers(200, last, 4).tolist() for _ in range(4)]
        answer = complete(client, [question + option for option in options], max_tokens=1, echo=True, logprobs=1)
        theirs = [sum(choice.logprobs.token_logprobs[len(question) : -1]) for choice in answer.choices]
        ours = []
        for option in options:
            logits = model.logits(question + option).astype(np.float64)[len(question) - 1 : -1]
            logits -= logits.max(axis=-1, keepdims=True)
            rows = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
            ours.append(rows[np.arange(len(option)), option].sum())
        np.testing.assert_allclose(theirs, ours, atol=1e-4)
        assert np.argmax(theirs) == np.argmax(ours)


def test_tokens_and_back(server, model):
    with server.http() as http:
        for text in TEXTS:
            answer = http.post("/v1/tokenize", json={"prompt": text}).json()
            assert answer["tokens"] == ids_of(model, text)
            assert answer["count"] == len(answer["tokens"])
            assert answer["max_model_len"] == model.config.text.max_position_embeddings
            back = http.post("/v1/detokenize", json={"tokens": answer["tokens"][1:]}).json()
            assert back == {"prompt": text}
        bare = http.post("/v1/tokenize", json={"prompt": "Hello", "add_special_tokens": False}).json()
        assert bare["tokens"] == model.tokenizer.encode("Hello")
        messages = [{"role": "user", "content": "Hello"}]
        asked = http.post("/v1/tokenize", json={"messages": messages}).json()
        assert tuple(asked["tokens"]) == model.prepare(messages).token_ids
        assert http.post("/v1/tokenize", json={}).status_code == 400
        assert http.post("/v1/detokenize", json={"tokens": [1 << 20]}).status_code == 400


def test_models_and_their_names(serve):
    server = serve(name="tiny-gemma", slice_name="e2b")
    client = server.openai()
    assert [entry.id for entry in client.models.list()] == ["tiny-gemma", "tiny-gemma:e2b"]
    assert client.models.retrieve("tiny-gemma:e2b").id == "tiny-gemma:e2b"
    for name, served in (("default", "tiny-gemma"), ("ignore", "tiny-gemma"), ("tiny-gemma:e2b", "tiny-gemma:e2b")):
        assert client.completions.create(model=name, prompt="a", max_tokens=1).model == served
    with pytest.raises(openai.NotFoundError, match="'tiny-gemma', 'tiny-gemma:e2b'") as refused:
        client.completions.create(model="gpt-4", prompt="a")
    assert refused.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_health_and_metrics(server, client):
    complete(client)
    with server.http() as http:
        assert http.get("/health").status_code == 200
        text = http.get("/metrics").text
    assert 'g3n_requests_total{path="/v1/completions",status="200"}' in text
    for name in ("queue_length", "completion_tokens_total", "time_to_first_token_seconds_count"):
        assert f"g3n_{name}" in text
    assert "g3n_time_between_tokens_seconds_bucket" in text
