"""A batch on a Ray cluster: Ray Data maps the requests over a pool of actors, each holding one model.

Backpressure, retries and the restart of actors are Ray Data's. An actor that dies takes no result with it that was
handed out, and what it was answering is answered by another.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from g3n_mlx.batch.requests import Request
from g3n_mlx.batch.worker import Worker
from g3n_mlx.failures import MissingPackage
from g3n_mlx.installation import install_command

LOCAL = "local"  # a cluster of this machine alone, which ends with the command
BATCH_ROWS = 32  # that an actor is given at once; it has two such batches, so that it is never without


def results(
    address: str, workers: int | None, requests: Sequence[Request], options: Mapping[str, Any]
) -> Iterator[dict[str, Any]]:
    """The result lines of some requests, as the cluster's actors finish them.

    address: of the cluster, "auto" or LOCAL. workers: actors, by default one for each GPU, else for each node.
    options: keywords of Worker. Raises ImportError without Ray.
    """
    try:
        import ray
        import ray.data
    except ImportError:
        raise MissingPackage(f"clusters need Ray: {install_command('ray')}") from None
    ray.init(address, log_to_driver=False)
    try:
        gpus, nodes = int(ray.cluster_resources().get("GPU", 0)), len(ray.nodes())
        count = workers or gpus or nodes
        rows = [{"request": json.dumps(request.fields())} for request in requests]
        blocks = -(-len(rows) // BATCH_ROWS)
        mapped = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
            Worker,
            fn_constructor_kwargs=dict(options),
            batch_size=BATCH_ROWS,
            compute=ray.data.ActorPoolStrategy(size=count),
            num_gpus=min(1, gpus / count) if gpus else None,
            num_cpus=max(1, int(ray.cluster_resources()["CPU"]) // count),
        )
        for row in mapped.iter_rows():
            yield json.loads(row["result"])
    finally:
        ray.shutdown()
