"""The exact index against sorting all scores, and what it must not depend on."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from negtune.retrieval import index as index_module
from negtune.retrieval.index import ExactIndex, FaissIndex
from tests.launching import run_script

ROOT = str(Path(__file__).resolve().parents[2])
SIZES = (1, 3_000, 10_000, 2**30)  # bytes: blocks of 64 documents, of a few more, and one block


def names(n):
    return [f"d{i}" for i in range(n)]


def few_values(rows, width=3, seed=0):
    """Vectors of -1, 0 and 1: products are exact in float32, and most of them equal to many others."""
    return torch.randint(-1, 2, (rows, width), generator=torch.Generator().manual_seed(seed)).float()


def sorted_all(queries, documents, k):
    scores = queries.double() @ documents.double().T
    return scores.sort(dim=1, descending=True, stable=True).indices[:, :k]


def test_the_best_documents_come_first_with_their_scores():
    documents = torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 0.0]])
    scores, positions = ExactIndex(documents, ["a", "b", "c"]).search(torch.tensor([[1.0, 0.0], [1.0, 2.0]]), 2)
    assert positions.tolist() == [[2, 0], [1, 2]]
    assert scores.tolist() == [[3.0, 1.0], [4.0, 3.0]]


def test_cosine_does_not_see_lengths_and_is_0_with_a_zero_vector():
    documents = torch.tensor([[9.0, 9.0], [0.1, 0.0], [0.0, 0.0], [-5.0, 0.0]])
    scores, positions = ExactIndex(documents, names(4), "cosine").search(torch.tensor([[2.0, 0.0]]), 4)
    assert positions.tolist() == [[1, 0, 2, 3]]
    torch.testing.assert_close(scores, torch.tensor([[1.0, 0.5**0.5, 0.0, -1.0]]))


@pytest.mark.parametrize("k", [1, 7, 100, 700])
@pytest.mark.parametrize("max_bytes", SIZES)
def test_of_equal_scores_the_first_in_the_index_wins_whatever_the_block_size(k, max_bytes):
    documents, queries = few_values(700), few_values(40, seed=1)
    scores, positions = ExactIndex(documents, names(700)).search(queries, k, max_bytes=max_bytes)
    assert torch.equal(positions, sorted_all(queries, documents, k))
    assert torch.equal(scores, (queries @ documents.T).gather(1, positions))


def test_equal_documents_come_in_the_order_of_the_index_even_when_all_are_equal():
    queries = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    for max_bytes in SIZES:
        _, positions = ExactIndex(torch.ones(300, 2), names(300)).search(queries, 9, max_bytes=max_bytes)
        assert positions.tolist() == [list(range(9))] * 2


@pytest.mark.parametrize("step", [1, -1])
def test_documents_that_get_better_or_worse_along_the_index_are_no_special_case(step):
    documents = torch.arange(500.0)[::step, None] if step > 0 else torch.arange(500.0).flip(0)[:, None]
    for max_bytes in SIZES:
        _, positions = ExactIndex(documents, names(500)).search(torch.ones(1, 1), 5, max_bytes=max_bytes)
        best = [499, 498, 497, 496, 495]
        assert positions.tolist() == [best if step > 0 else [499 - i for i in best]]


def test_scores_are_the_same_bits_for_every_block_size_and_for_queries_alone():
    generator = torch.Generator().manual_seed(0)
    documents, queries = (torch.randn(n, 37, generator=generator) for n in (900, 70))
    documents[500:600] = documents[:100]
    index = ExactIndex(documents, names(900), "cosine")
    whole = index.search(queries, 50)
    for max_bytes in SIZES:
        scores, positions = index.search(queries, 50, max_bytes=max_bytes)
        assert torch.equal(scores, whole[0])
        assert torch.equal(positions, whole[1])
    for i in (0, 69):
        alone = index.search(queries[i : i + 1], 50)
        assert torch.equal(alone[0][0], whole[0][i])
        assert torch.equal(alone[1][0], whole[1][i])


def test_many_queries_are_searched_in_blocks_too(monkeypatch):
    documents, queries = few_values(200), few_values(25, seed=1)
    index = ExactIndex(documents, names(200))
    monkeypatch.setattr(index_module, "QUERY_BLOCK", 10)
    exclude = [{"d0"} if i == 24 else set() for i in range(25)]
    _, positions = index.search(queries, 200, exclude=exclude)
    assert torch.equal(positions[:24], sorted_all(queries[:24], documents, 200))
    assert positions[24, -1] == -1


def test_no_more_than_the_bytes_asked_for_are_held(monkeypatch):
    shapes, merge = [], index_module._merge
    monkeypatch.setattr(
        index_module, "_merge", lambda s, p, found, start: shapes.append(found.shape) or merge(s, p, found, start)
    )
    ExactIndex(few_values(5000, 8), names(5000)).search(few_values(300, 8), 5, max_bytes=1_000_000)
    assert len(shapes) > 5
    assert max(rows * columns * 5 + columns * 8 * 8 for rows, columns in shapes) <= 1_000_000


def test_excluded_documents_are_not_found_and_leave_a_gap_at_the_end_when_too_few_remain():
    documents = torch.tensor([[4.0], [3.0], [2.0], [1.0]])
    index = ExactIndex(documents, ["a", "b", "c", "d"])
    exclude = [{"a", "c", "elsewhere"}, set(), ["d"]]
    scores, positions = index.search(torch.ones(3, 1), 3, exclude=exclude)
    assert positions.tolist() == [[1, 3, -1], [0, 1, 2], [0, 1, 2]]
    assert scores[0].tolist() == [3.0, 1.0, -torch.inf]


def test_exclusion_finds_its_document_in_later_blocks():
    documents, queries = few_values(400), few_values(5, seed=1)
    exclude = [{f"d{p}" for p in row.tolist()} for row in sorted_all(queries, documents, 150)]
    for max_bytes in SIZES:
        _, positions = ExactIndex(documents, names(400)).search(queries, 250, exclude=exclude, max_bytes=max_bytes)
        assert torch.equal(positions, sorted_all(queries, documents, 400)[:, 150:])


def test_with_fewer_documents_than_k_there_are_fewer_columns():
    scores, positions = ExactIndex(torch.eye(3), names(3)).search(torch.eye(3)[:2], 10)
    assert scores.shape == positions.shape == (2, 3)


def test_memory_mapped_and_half_precision_vectors_are_searched_in_float32(tmp_path):
    documents, queries = few_values(300, 4), few_values(6, 4, seed=1)
    expected = ExactIndex(documents, names(300)).search(queries, 20)
    np.save(tmp_path / "vectors.npy", documents.numpy())
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    documents.numpy().tofile(tmp_path / "vectors.bin")
    from_file = torch.from_file(str(tmp_path / "vectors.bin"), size=1200).view(300, 4)
    for vectors in (
        mapped,
        mapped.astype(np.float16),
        from_file,
        documents.bfloat16(),
        documents[:, [1, 0, 2, 3]].T[[1, 0, 2, 3]].T,
    ):
        scores, positions = ExactIndex(vectors, names(300)).search(queries, 20)
        assert scores.dtype == torch.float32
        assert torch.equal(scores, expected[0])
        assert torch.equal(positions, expected[1])


MAKING = """
import sys
sys.path.insert(0, {root!r})
import numpy as np
import torch
torch.set_num_threads(1)
from negtune.retrieval.index import ExactIndex

def private_mib():
    return next(int(line.split()[1]) for line in open("/proc/self/smaps_rollup") if line.startswith("Anonymous")) / 1024

np.lib.format.open_memmap("vectors.npy", "w+", np.float32, (200_000, 384)).flush()
vectors, ids = np.load("vectors.npy", mmap_mode="r"), [str(i) for i in range(200_000)]
before = private_mib()
index = ExactIndex(vectors, ids, "cosine")
grown = private_mib() - before
assert grown < 75, f"{{grown}} MiB"
"""


@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="reads the memory of a process as Linux has it"
)
def test_an_index_holds_its_ids_and_little_more(tmp_path):
    """Of 293 MiB of mapped vectors nothing stays: 30 MiB for the ids' places, 150 while blocks left holes behind."""
    run_script(MAKING.format(root=ROOT), tmp_path, processes=1, first_port=0)


def test_a_saved_index_is_the_same_when_read(tmp_path):
    documents = few_values(50).half()
    index = ExactIndex(documents, names(50), "cosine")
    index.save(tmp_path / "index")
    again = ExactIndex.load(tmp_path / "index")
    assert (again.ids, again.similarity, again.fingerprint()) == (index.ids, "cosine", index.fingerprint())
    assert torch.equal(again.embeddings, documents)
    assert sorted(path.name for path in (tmp_path / "index").iterdir()) == ["embeddings.safetensors", "index.json"]
    ExactIndex(documents.flip(0), names(50), "cosine").save(tmp_path / "other")
    (tmp_path / "other" / "embeddings.safetensors").rename(tmp_path / "index" / "embeddings.safetensors")
    with pytest.raises(ValueError, match=r"embeddings\.safetensors and index\.json are not of the same index"):
        ExactIndex.load(tmp_path / "index")


def test_the_fingerprint_moves_with_any_bit_and_with_nothing_else():
    documents = few_values(50)
    index = ExactIndex(documents, names(50))
    before = index.fingerprint()
    assert before == ExactIndex(documents.numpy(), names(50)).fingerprint()
    index.search(few_values(4), 10)
    assert index.fingerprint() == before
    changed = documents.clone()
    changed[49, 2] = torch.nextafter(changed[49, 2], torch.tensor(9.0))
    others = [
        ExactIndex(changed, names(50)),
        ExactIndex(documents, [*names(49), "x"]),
        ExactIndex(documents, names(50), "cosine"),
        ExactIndex(documents.half(), names(50)),
        ExactIndex(documents.half().view(torch.bfloat16), names(50)),  # the same bytes mean other numbers
    ]
    assert len({before, *(other.fingerprint() for other in others)}) == 6


@pytest.mark.parametrize("kind", [ExactIndex, FaissIndex])
def test_what_cannot_be_indexed_or_searched_is_named(kind):
    if kind is FaissIndex:
        pytest.importorskip("faiss", reason="needs faiss: pip install 'negtune[retrieval]'")
    vectors = torch.ones(3, 2)
    vectors[1, 0] = torch.nan
    with pytest.raises(ValueError, match="vector of document b is not finite"):
        kind(vectors, ["a", "b", "c"])
    with pytest.raises(ValueError, match=r"shape \[3, 2\] and 2 ids"):
        kind(vectors, ["a", "b"])
    with pytest.raises(ValueError, match="document id a comes twice"):
        kind(torch.ones(3, 2), ["b", "a", "a"])
    with pytest.raises(ValueError, match="neither 'dot' nor 'cosine'"):
        kind(torch.ones(3, 2), ["a", "b", "c"], "euclidean")
    index = kind(torch.ones(3, 2), ["a", "b", "c"])
    with pytest.raises(ValueError, match="at least 1, got 0"):
        index.search(torch.ones(1, 2), 0)
    with pytest.raises(ValueError, match=r"queries must be \[Q 2\] as the index is, got \[1, 3\]"):
        index.search(torch.ones(1, 3), 1)
    with pytest.raises(ValueError, match="one set of ids for each of 2 queries, got 1"):
        index.search(torch.ones(2, 2), 1, exclude=[set()])
    with pytest.raises(ValueError, match=r"vector of query 1 \(from 0\) is not finite"):
        index.search(torch.tensor([[1.0, 1.0], [1.0, torch.inf]]), 1)


@pytest.mark.parametrize("kind", [ExactIndex, FaissIndex])
def test_a_bad_vector_is_named_in_later_blocks_too(kind, monkeypatch):
    if kind is FaissIndex:
        pytest.importorskip("faiss", reason="needs faiss: pip install 'negtune[retrieval]'")
    monkeypatch.setattr(index_module, "READ_BYTES", 100)
    vectors = few_values(40)
    vectors[33] = torch.inf
    with pytest.raises(ValueError, match="vector of document d33 is not finite"):
        kind(vectors, names(40))


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_faiss_finds_what_the_exact_index_finds(similarity, monkeypatch):
    pytest.importorskip("faiss", reason="needs faiss: pip install 'negtune[retrieval]'")
    monkeypatch.setattr(index_module, "READ_BYTES", 1000)
    generator = torch.Generator().manual_seed(0)
    documents, queries = torch.randn(200, 8, generator=generator), torch.randn(9, 8, generator=generator)
    documents[150:160] = documents[20:30]  # ties, of three
    documents[180:190] = documents[20:30]
    exclude = [{f"d{i}", f"d{i + 1}", "d7"} for i in range(9)]
    for k, left_out in ((200, None), (30, exclude), (300, exclude)):
        expected = ExactIndex(documents, names(200), similarity).search(queries, k, exclude=left_out)
        scores, positions = FaissIndex(documents, names(200), similarity).search(queries, k, exclude=left_out)
        torch.testing.assert_close(scores, expected[0])
        assert torch.equal(positions, expected[1])


def test_without_faiss_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(
        ImportError, match=r"needs faiss, which is not installed; run: pip install 'negtune\[retrieval\]'"
    ):
        FaissIndex(torch.ones(1, 1), ["a"])
