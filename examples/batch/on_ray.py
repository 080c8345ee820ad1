"""One question about a folder of images, on a Ray cluster, by Ray Data's own reader: python on_ray.py [MODEL].

The folder may be on S3 or another store, and `write_parquet` writes the results to one.
"""

import sys
from pathlib import Path

import ray.data

from g3n_mlx.batch import Worker

MODEL = sys.argv[1] if len(sys.argv) > 1 else "demo"
FOLDER = Path(__file__).resolve().parent.parent / "media"

files = ray.data.read_binary_files([str(path) for path in sorted(FOLDER.glob("*.png"))], include_paths=True)
answers = files.map_batches(
    Worker,
    fn_constructor_args=(MODEL,),
    fn_constructor_kwargs={"prompt": "What is in this picture?", "temperature": 0.0},
    batch_size=32,
    compute=ray.data.ActorPoolStrategy(size=1),
)
for row in answers.iter_rows():
    print(Path(row["custom_id"]).name, "|", row["text"] or row["error"])
