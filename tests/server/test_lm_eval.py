"""lm_eval's local-completions on a task of our own, beside the model's own scores: pip install 'lm-eval[api]'."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TASK = Path(__file__).parent / "lm_eval_task"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("lm_eval") is None, reason="lm_eval is not installed")
def test_a_multiple_choice_task(server, model, demo, tmp_path):
    # The tokenizer's files alone: transformers would read config.json too, and import the model of it.
    tokenizer = tmp_path / "tokenizer"
    tokenizer.mkdir()
    shutil.copy(demo / "tokenizer.json", tokenizer)
    special = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<bos>", "eos_token": "<eos>"}
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({**special, "pad_token": "<pad>"}), "utf-8")
    options = f"model=default,base_url={server.url}/v1/completions,tokenizer_backend=huggingface,tokenizer={tokenizer}"
    command = [sys.executable, "-m", "lm_eval", "--model", "local-completions", "--include_path", str(TASK)]
    command += ["--model_args", f"{options},add_bos_token=True,num_concurrent=1", "--tasks", "g3n_choice"]
    command += ["--batch_size", "4", "--output_path", str(tmp_path), "--log_samples"]
    done = subprocess.run(command, cwd=TASK, capture_output=True, text=True, timeout=1200)
    assert done.returncode == 0, done.stderr[-3000:]
    (results,) = tmp_path.rglob("results_*.json")
    (samples,) = tmp_path.rglob("samples_*.jsonl")
    told = [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
    right = 0
    for sample in told:
        question, ours = sample["doc"], []
        for choice, response in zip(question["choices"], sample["resps"], strict=True):
            score = continuation_logprob(model, question["question"], f" {choice}")
            assert float(response[0][0]) == pytest.approx(score, abs=1e-3)
            ours.append(score)
        right += ours.index(max(ours)) == question["answer"]
    accuracy = json.loads(results.read_text("utf-8"))["results"]["g3n_choice"]["acc,none"]
    assert accuracy == pytest.approx(right / len(told))
    print(f"\naccuracy {accuracy:.2f} of {len(told)} questions, by lm_eval and by our own scores")


def continuation_logprob(model, context, continuation):
    """By `Gemma3n.score`: the sum over the tokens that the continuation adds."""
    from g3n_mlx.prompt.prompt import Prompt

    bos, encode = model.tokenizer.bos_id, model.tokenizer.encode
    ids = (bos, *encode(context + continuation))
    scores = [score for part in model.score(Prompt(ids, (len(ids),))) for score in part]
    return sum(score.logprob for score in scores[1 + len(encode(context)) :])
