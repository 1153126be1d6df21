"""What a step of ADORE costs: queries encoded twice, an exact search of a mapped corpus, loss, backward and AdamW.

Of each size of corpus, in a process of its own: seconds of a step, of the search alone and of the step without it, and
the private memory of making the loss and taking the steps. The corpus is random vectors in a file that is mapped.

    python benchmarks/query_encoder.py --corpus 100000 1000000
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from side_by_side import RESULTS, in_fresh_process, peak_private_mib, row, table, write_result

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--corpus", type=int, nargs="+", default=[100_000, 1_000_000])
parser.add_argument("--encoder", default="minilm", help="384 wide; tiny: 32")
parser.add_argument("--batch", type=int, default=32, help="queries of a step")
parser.add_argument("--depth", type=int, default=200)
parser.add_argument("--words", type=int, default=12, help="of a query")
parser.add_argument("--steps", type=int, default=10)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--name", default="query_encoder")
parser.add_argument("--folder", type=Path, default=RESULTS)
parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)


def write_corpus(path: Path, documents: int, width: int) -> None:
    """Random unit vectors, float32, written in blocks."""
    corpus = np.lib.format.open_memmap(path, "w+", np.float32, (documents, width))
    rng = np.random.default_rng(0)
    for start in range(0, documents, 50_000):
        block = rng.standard_normal((min(50_000, documents - start), width), dtype=np.float32)
        corpus[start : start + len(block)] = block / np.linalg.norm(block, axis=1, keepdims=True)
    corpus.flush()


def steps(args: argparse.Namespace, documents: int) -> list[dict[str, Any]]:
    from negtune.retrieval.index import ExactIndex
    from negtune.retrieval.losses import Lists
    from negtune.retrieval.query_side import QueryLoss
    from negtune.retrieval.rankers import load_ranker

    model = load_ranker(args.encoder).train()
    width = model.get_embedding_dimension()
    words = np.array("heart cell protein risk lower study patient growth signal factor binding response".split())
    rng = np.random.default_rng(1)
    texts = [" ".join(rng.choice(words, args.words)) for _ in range(args.batch)]
    wanted = torch.from_numpy(rng.integers(0, documents, (args.batch, 1)))
    judged = Lists(torch.ones(args.batch, 1), torch.ones(args.batch, 1, dtype=torch.bool), wanted)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    seconds: dict[str, list[float]] = {"step": [], "search": []}

    def features() -> dict[str, Any]:
        return model.preprocess(texts)

    def step(loss: Any) -> None:
        optimizer.zero_grad()
        loss([features()], judged).backward()
        optimizer.step()

    step(without_search(model, texts, judged))  # moments of AdamW are there before anything is counted
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.npy"
        write_corpus(path, documents, width)
        ids = [str(i) for i in range(documents)]

        def run() -> None:
            loss = QueryLoss(model, ExactIndex(np.load(path, mmap_mode="r"), ids, "cosine"), depth=args.depth)
            step(loss)
            for _ in range(args.steps):
                seconds["step"].append(timed(lambda: step(loss)))
                with torch.no_grad():
                    queries = model.eval()(features())["sentence_embedding"]
                model.train()
                seconds["search"].append(timed(partial(loss.index.search, queries, args.depth)))

        private = peak_private_mib(run)
    median = {name: statistics.median(values) for name, values in seconds.items()}
    case = f"{args.batch} queries, {args.encoder}, top {args.depth} of {documents} x {width}"
    return [
        row(f"step of ADORE: {case}", median["step"], None, "s", smallest=min(seconds["step"])),
        row(f"of it the search: {case}", median["search"], None, "s", smallest=min(seconds["search"])),
        row(f"private memory, peer: the vectors: {case}", private, documents * width * 4 / 2**20, "MiB"),
    ]


def without_search(model: Any, texts: list[str], judged: Any) -> Any:
    """The loss over an index of a few documents."""
    from dataclasses import replace

    from negtune.retrieval.index import ExactIndex
    from negtune.retrieval.query_side import QueryLoss

    few = torch.randn(len(texts) + 1, model.get_embedding_dimension())
    loss = QueryLoss(model, ExactIndex(few, [str(i) for i in range(len(few))], "cosine"), depth=len(texts))
    near = replace(judged, documents=torch.arange(len(texts)).unsqueeze(-1))
    return lambda features, _: loss(features, near)


def timed(call: Any) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one is not None:
        Path(args.one[1]).write_text(json.dumps(steps(args, int(args.one[0]))))
        return
    rows = [one for documents in args.corpus for one in in_fresh_process(str(documents), args.threads)]
    print(table(rows))
    print(write_result(args.name, rows, args.folder))


if __name__ == "__main__":
    main()
