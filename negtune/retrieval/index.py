"""Exact nearest documents, in memory that is fixed beforehand; and FAISS behind the same call.

Letters: `D` documents, `Q` queries, `H` width of a vector, `k` documents wanted.

Ties go to the document that comes first in the index. On a CPU results are the same bits whatever `max_bytes` is, and
whether queries come alone or together: no product is so small that BLAS would sum it in another order.
"""

from __future__ import annotations

import hashlib
import os
import warnings
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from negtune.records import read_json, write_json

EMBEDDINGS_FILE, IDS_FILE = "embeddings.safetensors", "index.json"
QUERY_BLOCK = 1024
FEWEST_ROWS = 64  # below about this many rows BLAS takes another kernel, whose sums round otherwise
READ_BYTES = 64 * 2**20
CHECKED_BYTES = 4 * 2**20
INSTALL = "pip install 'negtune[retrieval]'"

Hits = tuple[Float[Tensor, "Q k"], Int[Tensor, "Q k"]]


class ExactIndex:
    """All scores are computed, block by block, and the best kept.

    Args:
        embeddings: `[D H]`, a tensor or a numpy array, also a memory-mapped one: it is read in blocks and never copied
            whole. Products are float32 whatever its type. On a GPU the search runs there.
        ids: of the documents, `D` different ones.
        similarity: `dot` or `cosine`; a zero vector has cosine 0 with everything.

    Raises:
        ValueError: shapes that do not fit, an id that comes twice, or a NaN or infinite number, by document.
    """

    def __init__(self, embeddings: Tensor | np.ndarray, ids: Sequence[str], similarity: str = "dot") -> None:
        self.ids, self.similarity, self._embeddings = _checked_ids(embeddings, ids, similarity), similarity, embeddings
        self._positions = {document_id: i for i, document_id in enumerate(self.ids)}
        # in place: small results kept between large blocks leave holes in the heap, 400 MB at a million documents
        self._scale = torch.empty(len(self), device=self._device) if similarity == "cosine" else None
        for start, block in self._blocks(CHECKED_BYTES):
            _finite(block, self.ids, start)
            if self._scale is not None:
                self._scale[start : start + len(block)] = _inverse(block.norm(dim=1))

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def embeddings(self) -> Tensor | np.ndarray:
        """`[D H]`, as given."""
        return self._embeddings

    def vectors(self, positions: Int[Tensor, " M"]) -> Float[Tensor, "M H"]:
        """Copies of the vectors at these positions, of the index's type and on its device; no gradient reaches it."""
        if isinstance(self._embeddings, Tensor):
            return self._embeddings.detach()[positions.to(self._device)]
        return torch.from_numpy(self._embeddings[positions.cpu().numpy()])

    @torch.no_grad()
    def search(
        self,
        queries: Float[Tensor, "Q H"],
        k: int,
        *,
        exclude: Sequence[Collection[str]] | None = None,
        max_bytes: int = 16 * 2**20,
    ) -> Hits:
        """The best documents of each query, best first.

        Args:
            queries: `[Q H]`.
            k: at least 1; with fewer documents there are fewer columns.
            exclude: for each query, ids that are not to be found.
            max_bytes: held at a time, besides the result; 8 to 32 MiB were fastest. It changes the time only.

        Returns:
            scores `[Q k]` float32 and positions `[Q k]` int64 in the index, on the CPU; where exclusion leaves fewer
            than `k`, score -inf and position -1.
        """
        _check_queries(queries, k, exclude, self._embeddings.shape[1])
        banned = _positions_of(exclude, self._positions, len(queries))
        parts = [
            self._search_block(queries[i : i + QUERY_BLOCK], min(k, len(self)), banned[i : i + QUERY_BLOCK], max_bytes)
            for i in range(0, len(queries), QUERY_BLOCK)
        ]
        return torch.cat([scores for scores, _ in parts]), torch.cat([positions for _, positions in parts])

    def _search_block(self, queries: Tensor, k: int, banned: list[list[int]], max_bytes: int) -> Hits:
        n = len(queries)
        queries = queries.detach().to(self._device).float()
        if self._scale is not None:
            queries = queries * _inverse(queries.norm(dim=1))[:, None]
        queries = _padded(queries, FEWEST_ROWS)
        scores = queries.new_full((n, k), -torch.inf)
        positions = torch.full((n, k), -1, device=queries.device)
        rows, columns = _coordinates(banned, queries.device)
        # held for each document of a block: its vector, twice while it is converted, and a score and a mark per query
        rows_held = max_bytes // (8 * queries.shape[1] + 5 * len(queries))
        for start, block in self._blocks(4 * queries.shape[1] * max(FEWEST_ROWS, rows_held)):
            if self._scale is not None:
                block = block * self._scale[start : start + len(block), None]
            found = (queries @ _padded(block, FEWEST_ROWS).T)[:n, : len(block)]
            here = (columns >= start) & (columns < start + len(block))
            found[rows[here], columns[here] - start] = -torch.inf
            scores, positions = _merge(scores, positions, found, start)
        return scores.cpu(), positions.cpu()

    def fingerprint(self) -> str:
        """SHA-256 of similarity, ids, type, shape and every byte of the vectors."""
        rows = max(1, READ_BYTES // max(1, 8 * self._embeddings.shape[1]))
        kind = str(self._embeddings.dtype).rpartition(".")[2]  # torch.float32 and numpy's float32 are one
        digest = hashlib.sha256(repr((self.similarity, self.ids, kind, *self._embeddings.shape)).encode())
        for start in range(0, len(self), rows):
            block = self._embeddings[start : start + rows]
            if isinstance(block, Tensor):
                block = block.detach().cpu().contiguous().view(torch.uint8).numpy()
            digest.update(block.tobytes())
        return digest.hexdigest()

    def save(self, folder: str | os.PathLike) -> None:
        """Write vectors (safetensors) and ids (JSON) into `folder`, each file atomically."""
        from safetensors.torch import save_file

        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{EMBEDDINGS_FILE}.{os.getpid()}.tmp"
        save_file({"embeddings": _as_tensor(self._embeddings).detach().cpu().contiguous()}, temporary)
        os.replace(temporary, folder / EMBEDDINGS_FILE)
        about = {"similarity": self.similarity, "fingerprint": self.fingerprint(), "ids": self.ids}
        write_json(folder / IDS_FILE, about)

    @classmethod
    def load(cls, folder: str | os.PathLike) -> ExactIndex:
        """Read what `save` wrote; the vectors are memory-mapped.

        Raises:
            ValueError: the two files are not of one index.
        """
        from safetensors.torch import load_file

        about = read_json(Path(folder) / IDS_FILE)
        index = cls(load_file(Path(folder) / EMBEDDINGS_FILE)["embeddings"], about["ids"], about["similarity"])
        if index.fingerprint() != about["fingerprint"]:
            raise ValueError(f"{folder}: {EMBEDDINGS_FILE} and {IDS_FILE} are not of the same index; save it again")
        return index

    @property
    def _device(self) -> torch.device:
        return self._embeddings.device if isinstance(self._embeddings, Tensor) else torch.device("cpu")

    def _blocks(self, size: int) -> Iterator[tuple[int, Tensor]]:
        """`(first position, float32 vectors)` of at most `size` bytes."""
        rows = max(1, size // max(1, 4 * self._embeddings.shape[1]))
        for start in range(0, len(self), rows):
            yield start, _as_tensor(self._embeddings[start : start + rows]).detach().float()


class FaissIndex:
    """The same call on FAISS's flat inner-product index (`faiss-cpu` or `faiss-gpu`).

    Ties inside a list are ordered as `ExactIndex` does; which of several documents with the score of place `k` are in
    it, FAISS decides.

    Args:
        embeddings, ids, similarity: as in `ExactIndex`; the vectors are copied, normalised for `cosine`.
    """

    def __init__(self, embeddings: Tensor | np.ndarray, ids: Sequence[str], similarity: str = "dot") -> None:
        faiss = _faiss()
        self.ids, self.similarity = _checked_ids(embeddings, ids, similarity), similarity
        self._positions = {document_id: i for i, document_id in enumerate(self.ids)}
        self._index = faiss.IndexFlatIP(embeddings.shape[1])
        rows = max(1, READ_BYTES // max(1, 4 * embeddings.shape[1]))
        for start in range(0, len(self.ids), rows):
            block = _finite(_as_tensor(embeddings[start : start + rows]).detach().float().cpu(), self.ids, start)
            self._index.add(self._normalised(block))

    def __len__(self) -> int:
        return len(self.ids)

    def search(
        self, queries: Float[Tensor, "Q H"], k: int, *, exclude: Sequence[Collection[str]] | None = None
    ) -> Hits:
        """As `ExactIndex.search`; excluded documents are asked for and dropped."""
        _check_queries(queries, k, exclude, self._index.d)
        banned = _positions_of(exclude, self._positions, len(queries))
        k = min(k, len(self))
        deeper = min(len(self), k + max(map(len, banned), default=0))
        found, where = self._index.search(self._normalised(queries.detach().float().cpu()), deeper)
        scores, positions = torch.from_numpy(found), torch.from_numpy(where)
        for row, places in enumerate(banned):
            dropped = torch.isin(positions[row], torch.tensor(places, dtype=torch.int64))
            scores[row] = scores[row].masked_fill(dropped, -torch.inf)
            positions[row] = positions[row].masked_fill(dropped, -1)
        order = positions.sort(dim=1, stable=True).indices
        order = order.gather(1, scores.gather(1, order).sort(dim=1, descending=True, stable=True).indices)[:, :k]
        return scores.gather(1, order), positions.gather(1, order)

    def _normalised(self, vectors: Tensor) -> np.ndarray:
        if self.similarity == "cosine":
            vectors = vectors * _inverse(vectors.norm(dim=1))[:, None]
        return np.ascontiguousarray(vectors.numpy())


def _merge(scores: Tensor, positions: Tensor, found: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Best `k` of what is held and a later block. Later documents lose ties, so only better ones can enter."""
    k = scores.shape[1]
    enters = found > scores[:, -1:]
    if int(enters.sum(1).max()) > 4 * k:  # the first block, or falling luck: keep to the block's own best k and ties
        enters &= found >= found.topk(min(k, found.shape[1]), dim=1).values[:, -1:]
    rows, columns = enters.nonzero(as_tuple=True)
    if not len(rows):
        return scores, positions
    counts = enters.sum(1)
    places = torch.arange(len(rows), device=rows.device) - (counts.cumsum(0) - counts)[rows]
    new_scores = scores.new_full((len(scores), int(counts.max())), -torch.inf)
    new_positions = positions.new_full(new_scores.shape, -1)
    new_scores[rows, places] = found[rows, columns]
    new_positions[rows, places] = columns + start
    # stable: of equal scores those held come first, and new ones stand in the order of the index
    order = torch.cat([scores, new_scores], 1).sort(dim=1, descending=True, stable=True).indices[:, :k]
    return (
        torch.cat([scores, new_scores], 1).gather(1, order),
        torch.cat([positions, new_positions], 1).gather(1, order),
    )


def _checked_ids(embeddings: Tensor | np.ndarray, ids: Sequence[str], similarity: str) -> list[str]:
    if similarity not in ("dot", "cosine"):
        raise ValueError(f"similarity={similarity!r} is neither 'dot' nor 'cosine'")
    if embeddings.ndim != 2 or len(embeddings) != len(ids) or not len(ids):
        raise ValueError(
            f"an index needs [D H] vectors and D >= 1 ids, got shape {list(embeddings.shape)} and {len(ids)} ids"
        )
    if len(set(ids)) < len(ids):
        twice = Counter(ids).most_common(1)[0][0]
        raise ValueError(f"document id {twice} comes twice; ids are unique, drop one of its vectors")
    return list(ids)


def _check_queries(queries: Tensor, k: int, exclude: Sequence[Any] | None, width: int) -> None:
    if k < 1:
        raise ValueError(f"k counts documents and must be at least 1, got {k}")
    if queries.ndim != 2 or queries.shape[1] != width:
        raise ValueError(
            f"queries must be [Q {width}] as the index is, got {list(queries.shape)}; one encoder for both"
        )
    if exclude is not None and len(exclude) != len(queries):
        raise ValueError(f"exclude needs one set of ids for each of {len(queries)} queries, got {len(exclude)}")
    bad = (~queries.isfinite().all(1)).nonzero()
    if len(bad):
        raise ValueError(f"the vector of query {int(bad[0])} (from 0) is not finite; look at its text and the encoder")


def _finite(block: Tensor, ids: Sequence[str], start: int) -> Tensor:
    bad = (~block.isfinite().all(1)).nonzero()
    if len(bad):
        document = ids[start + int(bad[0])]
        raise ValueError(
            f"the vector of document {document} is not finite; encode it again, or drop it from the corpus"
        )
    return block


def _positions_of(exclude: Sequence[Collection[str]] | None, positions: dict[str, int], n: int) -> list[list[int]]:
    """Positions to leave out for each query; ids that are not in the index are left out already."""
    if exclude is None:
        return [[]] * n
    return [[positions[i] for i in ids if i in positions] for ids in exclude]


def _coordinates(places: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    pairs = [(row, place) for row, one in enumerate(places) for place in one]
    table = torch.tensor(pairs, dtype=torch.int64, device=device).view(-1, 2)
    return table[:, 0], table[:, 1]


def _inverse(norms: Tensor) -> Tensor:
    return torch.where(norms > 0, 1 / norms, 0.0)


def _padded(vectors: Tensor, rows: int) -> Tensor:
    if len(vectors) >= rows:
        return vectors
    return torch.cat([vectors, vectors.new_zeros((rows - len(vectors), vectors.shape[1]))])


def _as_tensor(vectors: Tensor | np.ndarray) -> Tensor:
    if isinstance(vectors, Tensor):
        return vectors
    with warnings.catch_warnings():  # of arrays that cannot be written to, as memory-mapped ones: they are only read
        warnings.simplefilter("ignore", UserWarning)
        return torch.from_numpy(np.asarray(vectors))


def _faiss() -> Any:
    try:
        import faiss
    except ImportError:
        raise ImportError(f"FaissIndex needs faiss, which is not installed; run: {INSTALL}") from None
    return faiss
