"""Stand-ins for llama.cpp's two programs: they take their flags, and print what commit 0c1e570 printed for an E2B."""

import stat
import sys
from pathlib import Path

BENCH = """
FIXED = {"build_commit": "0c1e570", "build_number": 1, "cpu_info": "AMD EPYC", "gpu_info": "", "backends": "CPU",
         "model_filename": "e2b-q4_0.gguf", "model_type": "gemma3n E2B Q4_0", "model_size": 3237995904,
         "model_n_params": 4458122848, "n_batch": 2048, "n_ubatch": 512, "n_threads": 2, "cpu_mask": "0x0",
         "cpu_strict": False, "poll": 50, "type_k": "f16", "type_v": "f16", "n_gpu_layers": -1, "repack": True}
if "--help" in words:
    print("usage: llama-bench [options]\\n  -o, --output <csv|json|jsonl|md|sql>\\n  -d, --n-depth <n>  (default: 0)")
    sys.exit(0)
assert flag("-o") == "jsonl" and flag("-r") == "1", words
for depth in flag("-d", "0").split(","):
    prompt, generated = int(flag("-p", "512")), int(flag("-n", "128"))
    rate = 80.0 if prompt else 16.0 - int(depth) / 100
    spent = int((prompt or generated) / rate * 1e9)
    test = {"n_prompt": prompt, "n_gen": generated, "n_depth": int(depth), "test_time": "2026-11-26T12:07:17Z",
            "avg_ns": spent, "stddev_ns": 0, "avg_ts": rate, "stddev_ts": 0.0}
    print(json.dumps(FIXED | test)[:-1] + f', "samples_ns": [ {spent} ],"samples_ts": [ {rate} ]' + "}")
"""
BATCHED = """
if "--help" in words:
    print("-npl n0,n1,...   number of parallel prompts\\n--output-format {md,jsonl}   output format")
    sys.exit(0)
assert flag("--output-format") == "jsonl", words
pp, tg = int(flag("-npp")), int(flag("-ntg"))
for pl in map(int, flag("-npl").split(",")):
    assert int(flag("-c")) >= pl * (pp + tg), words
    rate = 10.0 + 5 * pl
    print(json.dumps({"n_kv_max": int(flag("-c")), "n_batch": 2048, "n_ubatch": 512, "flash_attn": -1,
        "is_pp_shared": 0, "n_gpu_layers": -1, "n_threads": 2, "n_threads_batch": 2, "pp": pp, "tg": tg, "pl": pl,
        "n_kv": pl * (pp + tg), "t_pp": 0.327097, "speed_pp": 97.830307, "t_tg": pl * tg / rate, "speed_tg": rate,
        "t": 1.015200, "speed": 47.281322}))
"""
FLAGS = """
import json, sys, time
words = sys.argv[1:]
def flag(name, default=None):
    return words[words.index(name) + 1] if name in words else default
"""


def write_programs(folder: Path, bench: str = BENCH, batched: str | None = BATCHED) -> Path:
    """The path of llama-bench; the other one lies beside it, if at all."""
    write_program(folder / "llama-batched-bench", batched) if batched is not None else None
    return write_program(folder / "llama-bench", bench)


def write_program(path: Path, body: str) -> Path:
    path.write_text(f"#!{sys.executable}\n{FLAGS}{body}")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path
