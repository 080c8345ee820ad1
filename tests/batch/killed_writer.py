"""Run by test_kills.py: a process that runs a batch with a model that only waits, killed again and again.

Arguments: the requests, the results, how many kills. Each child is a fork, so that nothing is imported anew.
"""

import asyncio
import os
import random
import signal
import sys
import time
from pathlib import Path

from g3n_mlx.batch.journal import Journal
from g3n_mlx.batch.requests import RequestFile
from g3n_mlx.batch.results import Response
from g3n_mlx.batch.run import Progress, pending, run


class Waiting:
    """Answers after a random time; each answer is longer than a page of memory."""

    in_flight = 8

    async def answer(self, request):
        await asyncio.sleep(random.random() / 200)
        return Response(200, {"choices": [{"text": request.custom_id * 700, "finish_reason": "stop"}]})


def work(requests: Path, results: Path) -> int:
    source = RequestFile(requests)
    with Journal(results) as journal:
        entries = pending(source, journal)
        asyncio.run(run(Waiting(), source, entries, journal, Progress(len(entries), shown=False)))
    return len(entries)


def main() -> None:
    requests, results, kills = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    random.seed(0)
    survived = 0
    # Some are killed while they read what there is to do, which takes time on a slow machine, some while they write.
    began = time.perf_counter()
    with Journal(results.with_suffix(".unused")) as journal:
        pending(RequestFile(requests), journal)
    reading_s = time.perf_counter() - began
    for number in range(kills):
        child = os.fork()
        if child == 0:
            random.seed(number)
            work(requests, results)
            os._exit(0)
        time.sleep(random.random() * (3 * reading_s + 0.02))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        survived += not os.WIFSIGNALED(status)
    sys.stdout.write(f"{survived} {work(requests, results)}\n")


if __name__ == "__main__":
    main()
