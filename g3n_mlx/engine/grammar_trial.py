"""Compiles a grammar in a process of its own, where neither a crash nor gigabytes of memory harm anyone.

llguidance 1.9 bounds its work by "fuel", but not every step: intersections of regexes double until no memory is left,
which ends the process, and some numbers keep it busy for minutes. What can't be known before it has been tried is tried
here first. Run as a script, this file is the child.
"""

import json
import math
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

# The compiler calls itself for every rule and every level of a schema: some 5 KB each, 20 KB in the costliest.
STACK_BYTES = 256 << 20
MAX_BYTES = 2 << 30  # of the child
# Wall time that the child may take, in times of its processor time: others may keep the processors busy.
PATIENCE = 6
_stack_size_lock = threading.Lock()


def refusal(grammar: str, initial_fuel: int, step_fuel: int, timeout_s: float) -> str | None:
    """Why a grammar, as llguidance's LLMatcher takes it, can't be compiled; None when it can.

    timeout_s: seconds of processor time; what compiles on an idle machine compiles on a busy one.
    """
    slow = f"it takes more than {timeout_s:g} s to compile: make it simpler"
    fuel = {"initial_fuel": initial_fuel, "step_fuel": step_fuel}
    task = json.dumps({"grammar": grammar, **fuel, "seconds": math.ceil(timeout_s)}).encode()
    # Where a process has no limit of its own on its time, the clock has to do.
    wall_s = timeout_s if sys.platform == "win32" else PATIENCE * timeout_s
    try:
        # -P: the folder of this file is no place to import from.
        command = [sys.executable, "-P", __file__]
        done = subprocess.run(command, input=task, capture_output=True, timeout=wall_s, check=False)
    except subprocess.TimeoutExpired:
        return slow
    if sys.platform != "win32" and done.returncode == -signal.SIGXCPU:
        return slow
    if done.returncode != 0:
        return "it takes too much memory to compile: make it simpler"
    return json.loads(done.stdout)


def on_large_stack(work: Callable[[], T]) -> T:
    """The result of work that may call itself deeply, in a thread with the stack for it."""
    outcome: list[tuple[bool, Any]] = []

    def run() -> None:
        try:
            outcome.append((True, work()))
        except BaseException as error:  # noqa: BLE001 - it belongs to whoever waits
            outcome.append((False, error))

    with _stack_size_lock:
        before = threading.stack_size(STACK_BYTES)
        try:
            thread = threading.Thread(target=run, name="grammar", daemon=True)
            thread.start()
        finally:
            threading.stack_size(before)
    thread.join()
    ((returned, value),) = outcome
    if returned:
        return value
    raise value


def _child() -> None:
    """Answers with the reason, or null, as JSON. Any other end is the parent's to explain."""
    import llguidance

    task = json.loads(sys.stdin.buffer.read())
    if sys.platform != "win32":
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_AS, (MAX_BYTES, MAX_BYTES))
        resource.setrlimit(resource.RLIMIT_CPU, (task["seconds"], task["seconds"] + 1))
    limits = llguidance.LLParserLimits(
        initial_lexer_fuel=task["initial_fuel"], step_lexer_fuel=task["step_fuel"], verbose_errors=False
    )
    # 256 tokens, one for each byte, are enough to compile for.
    tokenizer = llguidance.LLTokenizer("byte")

    def compiled() -> str | None:
        matcher = llguidance.LLMatcher(tokenizer, task["grammar"], log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        return matcher.get_error() or None

    json.dump(on_large_stack(compiled), sys.stdout)


if __name__ == "__main__":
    _child()
