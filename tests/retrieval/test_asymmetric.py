"""Containment: norms that mean something, where they cannot, and what a learned magnitude changes."""

from __future__ import annotations

import random

import pytest
import torch
from datasets import Dataset
from sentence_transformers import SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from torch import nn

from negtune._st_compat import Normalize
from negtune.losses.asymmetric import asymmetric_similarity, contains
from negtune.metrics.ranking import micro_ap
from negtune.retrieval.asymmetric import MagnitudeHead, NormRatioLoss, add_magnitude, load_with_magnitude
from tests.retrieval.tiny_rankers import WORDS, bi_encoder, static_encoder


def texts(number, seed=0):
    """(part, whole): a whole of 12 to 20 words, and a third to a half of them in their order."""
    draw, found = random.Random(seed), []
    for _ in range(number):
        whole = draw.choices(WORDS, k=draw.randint(12, 20))
        start = draw.randrange(len(whole) // 2)
        found.append((" ".join(whole[start : start + draw.randint(4, len(whole) // 2)]), " ".join(whole)))
    return found


def train(model, folder, pairs, **settings):
    args = SentenceTransformerTrainingArguments(
        output_dir=str(folder), max_steps=60, per_device_train_batch_size=16, learning_rate=5e-3, report_to="none",
        save_strategy="no", use_cpu=True, disable_tqdm=True, seed=0,
    )  # fmt: skip
    rows = Dataset.from_dict({"part": [part for part, _ in pairs], "whole": [whole for _, whole in pairs]})
    SentenceTransformerTrainer(
        model=model, args=args, train_dataset=rows, loss=NormRatioLoss(model, **settings)
    ).train()
    return model


def longer_whole(model, pairs):
    """Share of pairs in which the whole has the larger norm."""
    parts, wholes = (model.encode([pair[i] for pair in pairs], convert_to_tensor=True).norm(dim=1) for i in (0, 1))
    return float((wholes > parts).float().mean())


def test_cosine_cannot_tell_a_part_from_a_whole_and_the_norm_of_a_sum_can():
    """Bags of words: 600 queries that are contained in their document, and 600 that contain it."""
    draw = torch.Generator().manual_seed(0)
    wholes = torch.randint(0, 3, (1200, 50), generator=draw).float()
    parts = wholes * (torch.rand(1200, 50, generator=draw) < 0.5)
    queries = torch.cat([parts[:600], wholes[600:]])
    documents = torch.cat([wholes[:600], parts[600:]])
    labels = (torch.arange(1200) < 600).numpy()
    cosines = nn.functional.cosine_similarity(queries, documents)
    filtered = cosines.where(contains(queries, documents).diagonal(), torch.tensor(-2.0))
    soft = asymmetric_similarity(queries, documents).diagonal()
    assert 0.45 < micro_ap(cosines.numpy(), labels) < 0.55
    assert micro_ap(filtered.numpy(), labels) >= 0.95
    assert micro_ap(soft.numpy(), labels) >= 0.95


def test_a_magnitude_learns_the_direction_and_the_mean_of_words_does_not(tmp_path):
    """Held-out pairs. Words cancel, so that the mean of a longer text is the shorter vector, trained or not."""
    learned, held_out = texts(400), texts(200, seed=1)
    bare = static_encoder()
    assert longer_whole(bare, held_out) <= 0.1
    train(bare, tmp_path / "a", learned, margin=None)
    assert longer_whole(bare, held_out) <= 0.1
    headed = train(add_magnitude(bi_encoder(tmp_path / "headed")), tmp_path / "b", learned)
    assert longer_whole(headed, held_out) >= 0.95


def test_training_moves_the_norms_as_told(tmp_path):
    """Told the other way round, what is larger is learned to be smaller: it is not the length that decides."""
    learned, held_out = texts(400), texts(200, seed=1)
    model = add_magnitude(bi_encoder(tmp_path / "model"))
    assert longer_whole(model, held_out) == 1.0
    train(model, tmp_path / "out", [(whole, part) for part, whole in learned], weight=5.0)
    assert longer_whole(model, held_out) < 0.5


def test_a_magnitude_leaves_the_direction_and_padding_alone(tmp_path):
    plain = bi_encoder(tmp_path / "model")
    model = add_magnitude(plain)
    nn.init.normal_(model[-1].amount.weight)
    several = ["w1 w2 w3", "w4", "w5 w6 w7 w8 w9 w10"]
    together = model.encode(several, convert_to_tensor=True)
    alone = torch.stack([model.encode(text, convert_to_tensor=True) for text in several])
    before = plain.encode(several, convert_to_tensor=True)
    assert torch.allclose(together, alone, rtol=1e-4, atol=1e-5)
    assert torch.allclose(model.similarity(together, together), plain.similarity(before, before), atol=1e-5)
    assert not torch.allclose(together.norm(dim=1), before.norm(dim=1))


def test_at_the_start_the_norm_counts_tokens(tmp_path):
    model = add_magnitude(bi_encoder(tmp_path / "model"))
    # [CLS] and [SEP] count
    found = model.encode(["w1", "w1 w2 w3 w4"], convert_to_tensor=True).norm(dim=1)
    assert found.tolist() == pytest.approx([3 * 0.6931472, 6 * 0.6931472], rel=1e-4)


def test_a_model_with_a_magnitude_is_saved_and_read(tmp_path):
    model = add_magnitude(bi_encoder(tmp_path / "model"))
    nn.init.normal_(model[-1].amount.weight)
    model.save_pretrained(str(tmp_path / "saved"))
    assert not list((tmp_path / "saved").rglob("*.bin"))
    again = load_with_magnitude(tmp_path / "saved", device="cpu")
    assert isinstance(again[-1], MagnitudeHead)
    assert again.similarity_fn_name == "cosine"
    assert torch.equal(torch.tensor(model.encode("w1 w2")), torch.tensor(again.encode("w1 w2")))


def test_a_folder_that_asks_for_code_is_refused(tmp_path):
    add_magnitude(bi_encoder(tmp_path / "model")).save_pretrained(str(tmp_path / "saved"))
    modules = tmp_path / "saved" / "modules.json"
    kept = modules.read_text()
    modules.write_text(kept.replace("MagnitudeHead", "Surprise"))
    with pytest.raises(ValueError, match="has a module negtune.retrieval.asymmetric.Surprise, whose code is not run"):
        load_with_magnitude(tmp_path / "saved")
    modules.write_text(kept)
    (tmp_path / "saved" / "asymmetric.py").write_text("raise SystemExit('run')")
    with pytest.raises(ValueError, match="asymmetric.py is code"):
        load_with_magnitude(tmp_path / "saved")
    (tmp_path / "saved" / "asymmetric.py").unlink()
    config = tmp_path / "saved" / "config.json"
    config.write_text(config.read_text().replace("{", '{"auto_map": {"AutoModel": "a.B"},', 1))
    with pytest.raises(ValueError, match="config.json is code, or asks for it"):
        load_with_magnitude(tmp_path / "saved")


class Normed(nn.Module):
    """LayerNorm without weights: of one length up to its epsilon."""

    def forward(self, features):
        features["sentence_embedding"] = nn.functional.layer_norm(features["sentence_embedding"], (32,))
        return features


@pytest.mark.parametrize("last", [Normalize, Normed])
def test_encoders_whose_norms_are_constant_are_refused_with_the_way_out(tmp_path, last):
    model = bi_encoder(tmp_path / "model")
    model.append(last())
    with pytest.raises(ValueError, match=rf"ends in {last.__name__} and .* pass add_magnitude\(model\)"):
        NormRatioLoss(model)
    if last is Normalize:
        NormRatioLoss(add_magnitude(model))


def test_static_embeddings_have_no_magnitude():
    with pytest.raises(ValueError, match="a static embedding has no token embeddings"):
        add_magnitude(static_encoder())
