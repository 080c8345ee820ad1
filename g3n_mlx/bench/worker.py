"""One run of one engine, in a process of its own, so that peak memory belongs to that run alone.

`bench` starts it for every run: `python -m g3n_mlx.bench.worker`, the request as JSON on stdin, the figures as JSON on
stdout.
"""

import json
import os
import sys
from dataclasses import asdict
from typing import Any

from g3n_mlx.bench.engines import engine
from g3n_mlx.bench.measure import Request
from g3n_mlx.failures import is_expected, one_line


def main() -> int:
    """Reads a request from stdin, prints a Run; a failure is one line on stderr and exit 1."""
    fields: dict[str, Any] = json.load(sys.stdin)
    for name in ("prompt_ids", "depths", "sequences"):
        fields[name] = tuple(fields[name])
    request = Request(**fields)
    # The peers print, some of them past Python: whatever is meant for stdout goes to stderr from here on.
    stdout = os.dup(sys.stdout.fileno())
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        run = engine(request.engine).measure(request)
    except Exception as error:
        if not is_expected(error):
            raise
        print(one_line(error), file=sys.stderr)
        return 1
    with os.fdopen(stdout, "w") as answer:
        json.dump(asdict(run), answer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
