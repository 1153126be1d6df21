"""What a policy gradient of the metric costs: against numpy, against InfoNCE in a whole training step; exact search.

loss     Loss and gradient of pg_rank (pl_rank, nDCG@10) for Q queries, D documents, N samples against PL-Rank in numpy,
         vectorised over the places of a sample and looped over queries and samples, and against a plain Python loop.
step     Forward, loss, backward and AdamW of a bi-encoder on the same texts: MultipleNegativesRankingLoss of
         sentence-transformers (whose candidates are all documents of the batch), and ours.
search   Exact top k of Q queries among D documents: seconds and peak memory, in a process of its own.

    python benchmarks/ranking.py loss step search
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from side_by_side import in_fresh_process, peak_private_mib, row, table, write_result

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("parts", nargs="*", default=["loss", "step", "search"])
parser.add_argument("--queries", type=int, default=64)
parser.add_argument("--documents", type=int, default=64)
parser.add_argument("--samples", type=int, default=16)
parser.add_argument("--repeats", type=int, default=20)
parser.add_argument("--encoder", default="minilm")
parser.add_argument("--batch", type=int, default=8, help="queries of a training step")
parser.add_argument("--list", type=int, default=8, help="documents of each of them")
parser.add_argument("--words", type=int, default=64, help="of a document")
parser.add_argument("--corpus", type=int, default=1_000_000)
parser.add_argument("--width", type=int, default=384)
parser.add_argument("--searched", type=int, default=1000, help="queries")
parser.add_argument("--top", type=int, default=100)
parser.add_argument("--threads", type=int, default=1)
parser.add_argument("--name", default="ranking")
parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)


# --- The loss ---------------------------------------------------------------------------------------------------------


def pl_rank_numpy(scores: np.ndarray, gains: np.ndarray, k: int, samples: int, rng: np.random.Generator) -> np.ndarray:
    """PL-Rank-3: each sample by cumulative sums over its places; queries and samples in loops. `[Q D]`."""
    n_queries, n = scores.shape
    weights = np.where(np.arange(n) < k, 1 / np.log2(np.arange(n) + 2), 0.0)
    found = np.zeros_like(scores)
    for q in range(n_queries):
        ideal = (np.sort(gains[q])[::-1][:k] * weights[:k]).sum()
        rho = gains[q] / ideal if ideal > 0 else np.zeros(n)
        top = scores[q].max()
        for _ in range(samples):
            order = np.argsort(-(scores[q] + rng.gumbel(size=n)))
            strength = np.exp(scores[q][order] - top)
            rest = strength[::-1].cumsum()[::-1]
            placed = weights * rho[order]
            to_go = placed[::-1].cumsum()[::-1]
            share_w, share_g = (weights / rest).cumsum(), (to_go * (np.arange(n) < k) / rest).cumsum()
            found[q][order] += to_go - placed + strength * (rho[order] * share_w - share_g)
    return found / samples


def pl_rank_loop(scores: np.ndarray, gains: np.ndarray, k: int, samples: int, rng: np.random.Generator) -> np.ndarray:
    """The same without vectors: places and documents in loops, the first query only. `[1 D]`."""
    import math

    found = np.zeros((1, scores.shape[1]))
    s, n = scores[0].tolist(), scores.shape[1]
    weights = [1 / math.log2(j + 2) if j < k else 0.0 for j in range(n)]
    ideal = sum(w * g for w, g in zip(weights, sorted(gains[0].tolist(), reverse=True), strict=True))
    rho = [g / ideal if ideal > 0 else 0.0 for g in gains[0].tolist()]
    for _ in range(samples):
        keys = [v - math.log(-math.log(rng.uniform(1e-12, 1.0))) for v in s]
        order = sorted(range(n), key=lambda d: -keys[d])
        for m, d in enumerate(order):
            total = sum(weights[j] * rho[order[j]] for j in range(m + 1, k))
            for i in range(min(m + 1, k)):
                rest = sum(math.exp(s[order[j]]) for j in range(i, n))
                behind = sum(weights[j] * rho[order[j]] for j in range(i, k))
                total += math.exp(s[d]) / rest * (weights[i] * rho[d] - behind)
            found[0, d] += total / samples
    return found


def loss_part(args: argparse.Namespace) -> list[dict[str, Any]]:
    from negtune.losses.ranking import lambda_rank, pg_rank

    generator = torch.Generator().manual_seed(0)
    shape = args.queries, args.documents
    scores = torch.randn(shape, generator=generator).requires_grad_()
    gains = (torch.rand(shape, generator=generator) < 0.1).float()
    mask = torch.ones(shape, dtype=torch.bool)

    def ours(estimator: str, samples: int = args.samples) -> torch.Tensor:
        scores.grad = None
        pg_rank(scores, gains, mask, k=10, n_samples=samples, estimator=estimator, generator=generator).sum().backward()
        return scores.grad

    rng = np.random.default_rng(0)
    plain = scores.detach().numpy().astype(np.float64), gains.numpy().astype(np.float64)
    agree = float(np.abs(-ours("pl_rank", 4096).numpy() - pl_rank_numpy(*plain, 10, 256, rng)).max())
    assert agree < 0.03, f"the two estimates are {agree} apart"
    looped = -ours("pl_rank", 4096).numpy()[:1] - pl_rank_loop(*plain, 10, 256, rng)
    assert np.abs(looped).max() < 0.05

    def lambdas() -> None:
        scores.grad = None
        lambda_rank(scores, gains, mask, k=10).sum().backward()

    jobs: dict[str, Callable[[], Any]] = {
        name: (lambda name=name: ours(name)) for name in ("pl_rank", "pl_rank_loo", "rtg_loo", "loo", "reinforce")
    }
    jobs |= {
        "lambda_rank": lambdas,
        "numpy, a sample at a time": lambda: pl_rank_numpy(*plain, 10, args.samples, rng),
        "Python loop (one query, times Q)": lambda: pl_rank_loop(*plain, 10, args.samples, rng),
    }
    seconds = alternately(jobs, args.repeats, at_least=0.02)
    seconds["Python loop (one query, times Q)"] *= args.queries
    ms = {name: 1e3 * value for name, value in seconds.items()}
    shape = f"{args.queries} x {args.documents}, N={args.samples}"
    peers = [
        row(
            f"pl_rank against numpy, {shape}",
            ms["pl_rank"],
            ms["numpy, a sample at a time"],
            "ms",
            10,
            difference=agree,
        ),
        row(f"pl_rank against a plain loop, {shape}", ms["pl_rank"], ms["Python loop (one query, times Q)"], "ms"),
    ]
    others = [
        name for name in ms if name not in ("pl_rank", "numpy, a sample at a time", "Python loop (one query, times Q)")
    ]
    return peers + [row(f"{name}, {shape}", ms[name], None, "ms") for name in others]


def alternately(jobs: dict[str, Callable[[], Any]], repeats: int, at_least: float = 0.0) -> dict[str, float]:
    """Median seconds of each job, all of them in turn, so that the machine's moods hit them alike.

    A job is called as often in a row as fills `at_least` seconds, once it is warm: a short one would be timed with what
    the long one before it left in the caches, and a long one warms its own.
    """
    times: dict[str, list[float]] = {name: [] for name in jobs}
    calls = {}
    for name, job in jobs.items():
        warm_until = time.perf_counter() + 10 * at_least
        job()
        while time.perf_counter() < warm_until:
            job()
        start = time.perf_counter()
        job()
        calls[name] = max(1, round(at_least / (time.perf_counter() - start)))
    for _ in range(repeats):
        for name, job in jobs.items():
            start = time.perf_counter()
            for _ in range(calls[name]):
                job()
            times[name].append((time.perf_counter() - start) / calls[name])
    return {name: statistics.median(values) for name, values in times.items()}


# --- A training step --------------------------------------------------------------------------------------------------


def step_part(args: argparse.Namespace) -> list[dict[str, Any]]:
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from negtune.retrieval.losses import RankingLoss
    from negtune.retrieval.rankers import load_ranker

    model = load_ranker(args.encoder).train()
    rng = np.random.default_rng(0)
    words = np.array("heart cell protein risk lower study patient growth signal factor binding response".split())
    texts = [
        [" ".join(rng.choice(words, args.words if j else 12)) for _ in range(args.batch)] for j in range(args.list + 1)
    ]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    losses = {
        "MultipleNegativesRankingLoss": MultipleNegativesRankingLoss(model),
        "pg_rank": RankingLoss(model, k=min(10, args.list)),
        "pg_rank, all documents of the batch": RankingLoss(model, in_batch=True),
        "lambda_rank": RankingLoss(model, "lambda_rank", k=min(10, args.list)),
    }

    def step(loss: Any) -> None:
        optimizer.zero_grad()
        loss([model.preprocess(column) for column in texts], None).backward()
        optimizer.step()

    repeats = max(3, args.repeats // 2)
    seconds = alternately({name: (lambda loss=loss: step(loss)) for name, loss in losses.items()}, repeats)
    base = seconds["MultipleNegativesRankingLoss"]
    case = f"step of {args.encoder}, {args.batch} x (1 + {args.list}) texts"
    return [
        row(f"{case}: {name} against InfoNCE", value, base, "s", 1 / 1.15)
        for name, value in seconds.items()
        if name != "MultipleNegativesRankingLoss"
    ]


# --- Search -----------------------------------------------------------------------------------------------------------


def search_one(args: argparse.Namespace) -> list[dict[str, Any]]:
    """In a process of its own: the corpus is a file that is mapped, as an index larger than memory is."""
    import tempfile

    from negtune.retrieval.index import ExactIndex

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "corpus.npy"
        corpus = np.lib.format.open_memmap(path, "w+", np.float32, (args.corpus, args.width))
        rng = np.random.default_rng(0)
        for start in range(0, args.corpus, 50_000):
            block = rng.standard_normal((min(50_000, args.corpus - start), args.width), dtype=np.float32)
            corpus[start : start + len(block)] = block
        corpus.flush()
        del corpus
        mapped = np.load(path, mmap_mode="r")
        queries = torch.from_numpy(rng.standard_normal((args.searched, args.width), dtype=np.float32))
        ids = [str(i) for i in range(args.corpus)]
        private = peak_private_mib(lambda: ExactIndex(mapped, ids).search(queries, args.top))
        index = ExactIndex(mapped, ids)
        start = time.perf_counter()
        scores, positions = index.search(queries, args.top)
        seconds = time.perf_counter() - start
        found = positions[0, :5].tolist()
        direct = (torch.from_numpy(np.ascontiguousarray(mapped[found])) @ queries[0]).tolist()
        assert np.allclose(direct, scores[0, :5].tolist(), rtol=1e-4)
    case = f"exact top {args.top} of {args.searched} queries among {args.corpus} x {args.width}"
    return [
        row(case, seconds, None, "s"),
        row(
            f"{case}: private memory of making the index and searching; peer: the vectors",
            private,
            args.corpus * args.width * 4 / 2**20,
            "MiB",
        ),
    ]


def main() -> None:
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.one is not None:
        Path(args.one[1]).write_text(json.dumps(search_one(args)))
        return
    rows: list[dict[str, Any]] = []
    for part in args.parts:
        if part not in PARTS:
            parser.error(f"unknown part {part!r}; choose {', '.join(PARTS)}")
        rows += PARTS[part](args)
    print(table(rows))
    print(write_result(args.name, rows))


PARTS = {"loss": loss_part, "step": step_part, "search": lambda args: in_fresh_process("search", args.threads)}

if __name__ == "__main__":
    main()
