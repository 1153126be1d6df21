"""A loss module for sentence-transformers' trainers over the pure objectives of `losses.ranking`.

Three kinds of model give scores for lists of documents: bi-encoders (one embedding a text), multi-vector encoders (one
a token, compared by MaxSim) and cross-encoders (a query with a document, causal LMs with yes/no logits among them).
What happens to the scores is the same.

Shapes: B queries, D documents of the longest list, M distinct texts that were embedded, H width.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from negtune._st_compat import (
    CachedLossMixin,
    MultiVectorEncoder,
    RandContext,
    colbert_scores_pairwise,
    create_minibatch,
    embed_columns,
    has_static_embedding_input,
)
from negtune.losses.hard_negatives import IN_BATCH_LOSSES
from negtune.losses.plackett_luce import PolicyGradient, policy_gradient
from negtune.losses.ranking import RANKING_LOSSES
from negtune.metrics.ranking import greedy_reward, ideal_value
from negtune.ops import at_least_float32
from negtune.retrieval.in_batch import pooled, share_columns, split_ids
from negtune.retrieval.lists import Lists as Lists
from negtune.retrieval.lists import first_relevant

logger = logging.getLogger(__name__)

OBJECTIVES: dict[str, Callable[..., Tensor]] = {**RANKING_LOSSES, **IN_BATCH_LOSSES}
NEED_TEACHER = ("margin_mse", "kl_distill")
READ_NO_GAINS = ("kl_distill",)
UNIFORM, SATURATED = 0.98, 0.01
"""Entropy of the first place over that of a uniform policy: above, nothing is preferred; below, nothing is tried."""
PATIENCE = 20
"""Batches before a saturated policy is told of."""


class NonFiniteScoresError(FloatingPointError):
    """The model gave scores that are no numbers: it has diverged, or its input was bad."""


class RankingWarning(UserWarning):
    """The policy cannot learn as it is: uniform, or so certain that every sample is the same."""


class RankingLoss(CachedLossMixin, nn.Module):
    """Train any sentence-transformers model on lists of documents with an objective of `losses.ranking`.

    For the stock trainers: `SentenceTransformerTrainer` and `MultiVectorEncoderTrainer` with the columns query,
    document_0, ..., document_{n-1} and `label`, a list of n gains (below 0: padding; no label: the first is the
    relevant one), for `margin_mse` and `kl_distill` a teacher's scores (NaN: padding); `CrossEncoderTrainer` with
    query, documents (a list) and `label` (a list as long). `RankingTrainer` makes one of these itself.

    `in_batch`, a document that is known to be relevant to a query is no negative of it, and documents of the same text
    count once. Relevant are a query's documents with a gain, also those of an equal query, and what `label` names with
    `label_ids`. The batch is that of one process.

    Rankings are drawn once, from the scores that the gradient is of: also with dropout, and between the two passes of
    GradCache.

    Args:
        model: `SentenceTransformer`, `CrossEncoder` or `MultiVectorEncoder`.
        loss_type: one of `RANKING_LOSSES`, or `star` or `masked_infonce`, which are `in_batch`.
        scale: similarities are multiplied by it. Default: 20 for cosines, which are a uniform policy at 1; else 1.
        mini_batch_size: texts embedded at a time, by GradCache: memory for that many, the same gradients, two forward
            passes. None: all at once. Static embeddings cannot be split and are always embedded at once.
        mini_batch_num_tokens: the same, by tokens.
        in_batch: the documents of all queries of the batch are candidates of each, those of others with gain 0.
        label_ids: labels of the columns query, positive, negative_1, ... are ids and not gains: of the documents (-1:
            padding), then of all documents known to be relevant, padded with -1. `in_batch.to_columns` makes them.
        objective: `(scores, gains, mask, **more) -> [Q]` to use instead of the named one; `more` is that of `Lists`.
        reward_fn: for `pg_rank`, `(rankings [N B k], rows) -> rewards [N B]`; see `losses.ranking.pg_rank`.
        loss_kwargs: hyper-parameters of the objective.

    Raises:
        ValueError: no such objective or hyper-parameter, or a model whose similarity is neither cosine nor dot.
    """

    objectives: ClassVar[Mapping[str, Callable[..., Tensor]]] = OBJECTIVES

    def __init__(
        self,
        model: nn.Module,
        loss_type: str = "pg_rank",
        *,
        scale: float | None = None,
        mini_batch_size: int | None = None,
        mini_batch_num_tokens: int | None = None,
        in_batch: bool = False,
        label_ids: bool = False,
        objective: Callable[..., Tensor] | None = None,
        reward_fn: Callable[..., Tensor] | None = None,
        **loss_kwargs: Any,
    ) -> None:
        super().__init__()
        self.model, self.kind = model, kind_of(model)
        self.cosine = self.kind == "bi_encoder" and _similarity(model) == "cosine"
        self.scale = scale if scale is not None else 20.0 if self.cosine else 1.0
        if not self.scale > 0:
            raise ValueError(f"scale must be positive, got {self.scale}")
        self.loss_type, self.objective = loss_type, objective
        self.loss_kwargs = known_settings(loss_type, loss_kwargs, self.objectives)
        self.reward_fn, self.label_ids = reward_fn, label_ids
        self.in_batch = in_batch = in_batch or loss_type in IN_BATCH_LOSSES
        if reward_fn is not None and loss_type != "pg_rank":
            raise ValueError(f"reward_fn is for pg_rank, got loss_type={loss_type}")
        if in_batch and self.kind == "cross_encoder":
            raise ValueError("in_batch would score every query with every document of the batch by a cross-encoder")
        if in_batch and (self.teacher or loss_kwargs.get("kl_weight")):
            raise ValueError(
                "in_batch has no teacher's scores, and none of the warm start, for documents of other queries; leave "
                "in_batch out"
            )
        if in_batch and reward_fn is not None:
            raise ValueError("in_batch ranks documents of other queries too, which reward_fn does not know")
        if label_ids and not in_batch:
            raise ValueError("label_ids say what is no negative among the documents of others; set in_batch=True")
        self.mini_batch_num_tokens = mini_batch_num_tokens
        self.mini_batch_size = mini_batch_size if mini_batch_size is not None else 32
        self.uses_gradient_cache = mini_batch_size is not None or mini_batch_num_tokens is not None
        if self.uses_gradient_cache and self.kind != "cross_encoder" and has_static_embedding_input(model):
            logger.warning("static embeddings cannot be split into mini-batches: all texts are embedded at once")
            self.uses_gradient_cache = False
        self._sums = {mode: defaultdict(lambda: [0.0, 0]) for mode in ("train", "eval")}
        self._batches, self._certain, self._told, self._unscored = 0, 0, set(), 0

    # --- from texts to scores -----------------------------------------------------------------------------------------

    def forward(
        self, sentence_features: Any, labels: Any = None, prompt: str | None = None, task: str | None = None
    ) -> Tensor:
        features = list(sentence_features)
        if isinstance(labels, Lists):
            lists = labels
        elif self.kind == "cross_encoder":
            features, lists = self._pairs(features, labels, prompt, task)
        else:
            features, lists = self._columns(features, labels)
        if self.uses_gradient_cache:
            return self.forward_cached(features, lists)
        if self.kind == "bi_encoder":
            return self.calculate_loss([[rep] for rep in embed_columns(self.model, features)], lists)
        return self.calculate_loss([[self._outputs(column)] for column in features], lists)

    def scores(self, features: Sequence[dict[str, Any]], lists: Lists) -> Tensor:
        """Scaled scores of lists `[B D]`, all at once; 0 for padding."""
        return self._scores([[self._outputs(column)] for column in features], lists).masked_fill(~lists.mask, 0.0)

    def compute_loss_from_embeddings(self, embeddings: Sequence[Tensor], labels: Any) -> Tensor:
        """Of embeddings of the columns, as some wrapper losses have them; `in_batch` ids alone say then what is the
        same."""
        if not isinstance(labels, Lists):
            labels = self._lists_of(labels, len(embeddings[0]), len(embeddings) - 1, embeddings[0].device, None)
        return self.calculate_loss([[rep] for rep in embeddings], labels)

    def calculate_loss(self, reps: Sequence[Sequence[Tensor]], labels: Lists, *, with_backward: bool = False) -> Tensor:
        """The loss from embeddings (or pair scores) of each column in mini-batches, down to them if asked."""
        lists = pooled(labels) if self.in_batch else labels
        with torch.autocast(lists.mask.device.type, enabled=False):
            loss = self._loss(self._scores(reps, lists), lists)
            if with_backward:
                loss.backward()
        return loss.detach() if with_backward else loss

    def embed_minibatch(self, sentence_feature, begin, end, with_grad, copy_random_state, random_state=None):
        """As in the host, for all kinds of model."""
        part = create_minibatch(sentence_feature, begin, end)
        with random_state or nullcontext(), torch.set_grad_enabled(with_grad):
            state = RandContext(*part.values()) if copy_random_state else None
            return self._outputs(part), state

    def _outputs(self, features: dict[str, Any]) -> Tensor:
        """[M H] embeddings, [M] scores of pairs, or [M T H+1] embeddings of tokens with their mask behind them."""
        if self.kind == "cross_encoder":
            return self.model(features)["scores"].view(-1)
        if self.kind == "bi_encoder":
            return self.model(features)["sentence_embedding"]
        features = dict(features)
        task = features.get("task")
        found = self.model(features, task=task) if task is not None else self.model(features)
        tokens, mask = found["token_embeddings"], found["attention_mask"].bool()
        return torch.cat([tokens.masked_fill(~mask.unsqueeze(-1), 0.0), mask.unsqueeze(-1).to(tokens.dtype)], -1)

    def _scores(self, reps: Sequence[Sequence[Tensor]], lists: Lists) -> Tensor:
        """[B D], in float32 or wider, times the scale."""
        if self.kind == "cross_encoder":
            return at_least_float32(torch.cat(list(reps[0])))[lists.documents] * self.scale
        if self.kind == "multi_vector":
            return self._max_sim(reps, lists) * self.scale
        parts = list(reps[0]), [r for column in reps[1:] for r in column]
        queries, documents = (at_least_float32(torch.cat(part)) for part in parts)
        if self.cosine:
            queries, documents = F.normalize(queries, dim=-1), F.normalize(documents, dim=-1)
        if lists.own is not None or lists.documents.shape[-1] >= len(documents):  # a gather would copy vectors
            return (queries @ documents.T).gather(-1, lists.documents) * self.scale
        return torch.einsum("bh,bdh->bd", queries, documents[lists.documents]) * self.scale

    def _max_sim(self, reps: Sequence[Sequence[Tensor]], lists: Lists) -> Tensor:
        queries, documents = _stack_tokens(reps[0]), _stack_tokens([r for column in reps[1:] for r in column])
        rows, columns = lists.mask.nonzero(as_tuple=True)
        wanted = documents[lists.documents[rows, columns]]
        q, q_mask = at_least_float32(queries[rows][..., :-1]), queries[rows][..., -1] > 0
        d, d_mask = at_least_float32(wanted[..., :-1]), wanted[..., -1] > 0
        found = colbert_scores_pairwise(q, d, queries_mask=q_mask, documents_mask=d_mask)
        return torch.zeros(lists.mask.shape, dtype=found.dtype, device=found.device).index_put((rows, columns), found)

    # --- from columns to lists ----------------------------------------------------------------------------------------

    def _columns(self, features: list[Any], labels: Any) -> tuple[list[Any], Lists]:
        if len(features) < 2:
            raise ValueError(f"need a query column and at least one document column, got {len(features)} columns")
        n_queries = _rows(features[0])
        return features, self._lists_of(labels, n_queries, len(features) - 1, features[0]["input_ids"].device, features)

    def _lists_of(
        self, labels: Any, n_queries: int, n_columns: int, device: torch.device, features: list[Any] | None
    ) -> Lists:
        """Without labels the first document is the relevant one."""
        if self.label_ids:
            gains = split_ids(labels, n_queries, n_columns)
            return share_columns(Lists.of_labels(gains, n_queries, n_columns), features, labels)
        if labels is None and not self.teacher:
            labels = first_relevant(torch.zeros(n_queries, n_columns, device=device))
        if not isinstance(labels, Tensor):
            raise ValueError(
                f"{self.loss_type} needs label, a teacher's score for each document"
                if labels is None
                else "labels of a bi-encoder must be rectangular: pad lists with empty documents and label -1"
            )
        lists = Lists.of_labels(labels, n_queries, n_columns, teacher=self.teacher)
        return share_columns(lists, features) if self.in_batch else lists

    def _pairs(self, inputs: list[Any], labels: Any, prompt: str | None, task: str | None) -> tuple[list[Any], Lists]:
        queries, documents = inputs
        if labels is None or len(labels) != len(queries) or (isinstance(labels, Tensor) and labels.ndim != 2):
            raise ValueError("a cross-encoder needs label, a list of one gain for each document")
        for query, docs, row in zip(queries, documents, labels, strict=True):
            if len(docs) != len(row):
                raise ValueError(f"{len(docs)} documents and {len(row)} gains for the query {str(query)[:80]!r}")
        pairs = [(query, doc) for query, docs in zip(queries, documents, strict=True) for doc in docs]
        device = next(self.model.parameters()).device
        features = self.model.preprocess(pairs, prompt=prompt, task=task)
        features = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in features.items()}
        return [features], Lists.of_label_lists(labels, device, teacher=self.teacher)

    @property
    def teacher(self) -> bool:
        """Whether labels of sentence-transformers' trainers are a teacher's scores."""
        return self.loss_type in NEED_TEACHER and self.objective is None

    # --- from scores to the loss --------------------------------------------------------------------------------------

    def _loss(self, scores: Tensor, lists: Lists) -> Tensor:
        found = None
        if not bool((scores.isfinite() | ~lists.mask).all()):
            raise NonFiniteScoresError("the model's scores are not finite; it has diverged: lower the learning rate")
        if self.objective is not None:
            losses = self.objective(scores, lists.gains, lists.mask, **lists.more)
        elif self.loss_type == "pg_rank":
            found = self._policy_gradient(scores, lists)
            losses = found.loss
        else:
            losses = self.objectives[self.loss_type](scores, lists.gains, lists.mask, **self._arguments(lists))
        counted, mode = self.counted(lists), "train" if torch.is_grad_enabled() else "eval"
        with torch.no_grad():
            counted = self._scored(mode, counted, found)
            self._track(mode, scores, lists, counted, losses, found)
            if mode == "train" and found is not None:
                self._watch(found, counted)
        return lists.mean(losses, counted)

    def _scored(self, mode: str, counted: Tensor, found: PolicyGradient | None) -> Tensor:
        """Without the queries of which a reward function scored too few rankings."""
        if found is None or self.reward_fn is None:
            return counted
        unscored = int((counted & ~found.scored).sum())
        self._sums[mode]["queries/unscored"][0] += unscored
        self._sums[mode]["queries/unscored"][1] += int(counted.sum())
        if mode == "train":
            self._unscored += unscored
        return counted & found.scored

    def take_unscored(self) -> int:
        """Queries of this process since the last call that counted in `Lists.total` and could not be scored."""
        unscored, self._unscored = self._unscored, 0
        return unscored

    def counted(self, lists: Lists) -> Tensor:
        """Queries that say something, as far as is known before they are scored, [B]: with a relevant document; where
        no gains are read, with any document."""
        if self.reward_fn is not None or (self.loss_type in READ_NO_GAINS and self.objective is None):
            return lists.mask.any(-1)
        return lists.relevant.any(-1)

    def _arguments(self, lists: Lists) -> dict[str, Any]:
        arguments = dict(self.loss_kwargs)
        if self.loss_type in NEED_TEACHER:
            if lists.teacher is None:
                raise ValueError(f"{self.loss_type} needs teacher_scores, one for each document")
            arguments["teacher_scores"] = lists.teacher
        if self.loss_type == "star":
            arguments["own"] = lists.own
        if self.loss_type == "lambda_rank" and lists.ideal is not None:
            arguments["ideal_gains"] = lists.ideal
        return arguments

    def _policy_gradient(self, scores: Tensor, lists: Lists) -> PolicyGradient:
        settings = {**self.loss_kwargs, "k": min(self.loss_kwargs.get("k", 10), scores.shape[-1])}
        if self.reward_fn is not None:
            settings["reward_fn"] = partial(self.reward_fn, rows=lists.rows)
        if not torch.is_grad_enabled():  # an evaluation draws the same every time, and nothing from the training's
            settings["generator"] = torch.Generator(device=scores.device).manual_seed(0)
            if lists.start is None:
                settings.pop("kl_weight", None)  # lists to evaluate have no scores of the warm start
        return policy_gradient(
            scores, lists.gains, lists.mask, ideal_gains=lists.ideal, ref_scores=lists.start, **settings
        )

    # --- what a person watches ----------------------------------------------------------------------------------------

    def take_metrics(self, mode: str = "train") -> dict[str, tuple[float, float]]:
        """Sum and count of each metric since the last call, of this process.

        `reward/greedy`: the metric of each list ranked by score, equal scores in the worst order, lists without a
        relevant document left out; `positive/score`, `negative/score` and `positive/probability` (to be drawn first);
        `in_batch/withheld`: documents of the batch that a query has not as candidates, known to be relevant to it;
        `queries/skipped`: share without a relevant document (those that a stream left out among them), or unscored;
        `queries/unscored`: share of which a reward function scored too few rankings. Of `pg_rank` also
        `reward/expected`: the mean of sampled rankings; `reward/flat`: share of queries whose samples all earn the
        same, and that say nothing; `policy/entropy` of the first place, in nats, `policy/uniformity`, the same over log
        of the documents; `gradient/variance` of the estimate by score, `gradient/norm` of the estimate.
        """
        found = {name: (float(total), float(count)) for name, (total, count) in self._sums[mode].items()}
        self._sums[mode].clear()
        return found

    def _track(
        self,
        mode: str,
        scores: Tensor,
        lists: Lists,
        counted: Tensor,
        losses: Tensor,
        found: PolicyGradient | None,
    ) -> None:
        sums = self._sums[mode]
        scores = scores.detach()

        def add(name: str, values: Tensor, keep: Tensor) -> None:
            kept = values[keep].double()
            sums[name][0] += float(kept.sum())
            sums[name][1] += kept.numel()

        if mode == "eval":
            add("loss", losses.detach(), counted)
        relevant = lists.relevant
        add("positive/score", scores, relevant)
        add("negative/score", scores, lists.mask & ~relevant)
        temperature = self.loss_kwargs.get("temperature", 1.0)
        chances = (scores / temperature).masked_fill(~lists.mask, -torch.inf).softmax(-1)
        add("positive/probability", chances.masked_fill(~relevant, 0.0).sum(-1), relevant.any(-1))
        if lists.withheld is not None:
            add("in_batch/withheld", lists.withheld, counted)
        skipped = sums["queries/skipped"]
        skipped[0], skipped[1] = (n + lists.left_out for n in skipped)
        add("queries/skipped", (~counted).double(), torch.ones_like(counted))
        if found is None or found.greedy is None:
            k = min(self.loss_kwargs.get("k") or 10, scores.shape[-1])
            judged = lists.gains.masked_fill(~lists.mask, 0.0) if lists.ideal is None else lists.ideal
            greedy = greedy_reward(scores, lists.gains, lists.mask, "ndcg", ideal_value(judged, "ndcg", k), k)
            add("reward/greedy", greedy, relevant.any(-1))
        if found is None:
            return
        if found.greedy is not None:
            add("reward/greedy", found.greedy, counted)
        expected = found.rewards.nanmean(0)
        add("reward/expected", expected, counted & ~expected.isnan())
        add("reward/flat", found.flat.double(), counted)
        add("policy/entropy", found.entropy, counted)
        several = counted & (found.log_lengths > 0)
        add("policy/uniformity", found.entropy / found.log_lengths, several)
        add("gradient/norm", found.gradient.norm(dim=-1), counted)
        add("gradient/variance", found.variance, counted & ~found.variance.isnan())

    def _watch(self, found: PolicyGradient, counted: Tensor) -> None:
        several = counted & (found.log_lengths > 0)
        if not several.any():
            return
        self._batches += 1
        mean, flat = float((found.entropy / found.log_lengths)[several].mean()), found.flat[several]
        if self._batches == 1 and mean > UNIFORM:
            self.tell(
                "uniform",
                f"the policy is uniform (entropy of the first place {mean:.3f} of its maximum): a cold start, where "
                "relevant documents are hardly ever drawn early and gradients are tiny. Start from a trained "
                f"retriever, or raise scale (now {self.scale:g})",
            )
        self._certain = self._certain + 1 if mean < SATURATED and float(flat.double().mean()) > 0.9 else 0
        if self._certain == PATIENCE:
            self.tell(
                "saturated",
                f"the policy is certain (entropy of the first place {mean:.1e} of its maximum for {PATIENCE} batches): "
                "all samples are the same ranking and say nothing. Lower scale "
                f"(now {self.scale:g}) or raise temperature",
            )

    def tell(self, what: str, text: str) -> None:
        """Warn once of each kind of thing."""
        if what not in self._told:
            self._told.add(what)
            warnings.warn(text, RankingWarning, stacklevel=2)

    def get_config_dict(self) -> dict[str, Any]:
        """For the host's model card."""
        settings = {k: getattr(v, "__name__", v) for k, v in self.loss_kwargs.items()}
        cached = {"mini_batch_size": self.mini_batch_size} if self.uses_gradient_cache else {}
        return {"loss_type": self.loss_type, "scale": self.scale, "in_batch": self.in_batch, **cached, **settings}

    @property
    def citation(self) -> str:
        """Of the objective, in BibTeX."""
        if self.loss_type == "star":
            return (
                "@inproceedings{zhan2021optimizing,\n"
                "    title={Optimizing Dense Retrieval Model Training with Hard Negatives},\n"
                "    author={Jingtao Zhan and Jiaxin Mao and Yiqun Liu and Jiafeng Guo and Min Zhang and Shaoping Ma},"
                "\n    booktitle={SIGIR},\n    year={2021},\n    eprint={2104.08051},\n    archivePrefix={arXiv}\n}"
            )
        if self.loss_type != "pg_rank":
            return ""
        return (
            "@misc{gao2023policygradient,\n"
            "    title={Policy-Gradient Training of Language Models for Ranking},\n"
            "    author={Ge Gao and Jonathan D. Chang and Claire Cardie and Kiant\\'e Brantley and "
            "Thorsten Joachims},\n"
            "    year={2023},\n    eprint={2310.04407},\n    archivePrefix={arXiv}\n}"
        )


def kind_of(model: nn.Module) -> str:
    """bi_encoder, cross_encoder or multi_vector.

    Raises:
        ValueError: it is none of them.
    """
    from sentence_transformers import CrossEncoder, SentenceTransformer

    for kind, cls in (
        ("multi_vector", MultiVectorEncoder),
        ("cross_encoder", CrossEncoder),
        ("bi_encoder", SentenceTransformer),
    ):
        if isinstance(model, cls):
            return kind
    if hasattr(model, "num_labels") and hasattr(model, "preprocess"):
        return "cross_encoder"
    raise ValueError(
        f"model must be a SentenceTransformer, CrossEncoder or MultiVectorEncoder, got {type(model).__name__}; for a "
        "causal LM see causal_encoder in negtune.retrieval.encoder and causal_reranker in negtune.retrieval.rankers"
    )


def _similarity(model: Any) -> str:
    name = model.similarity_fn_name or "cosine"
    if name not in ("cosine", "dot"):
        raise ValueError(f"the model's similarity is {name}; set similarity_fn_name to cosine or dot")
    return name


def known_settings(
    loss_type: str, given: Mapping[str, Any], objectives: Mapping[str, Callable[..., Tensor]] = OBJECTIVES
) -> dict[str, Any]:
    """Hyper-parameters of one of the objectives, tried out on a list of their own.

    Raises:
        ValueError: no such objective, no such hyper-parameter, or a value it cannot have.
    """
    if loss_type not in objectives:
        raise ValueError(f"unknown loss_type {loss_type!r}; choose one of {', '.join(sorted(objectives))}")
    objective = objectives[loss_type]
    parameters = inspect.signature(objective).parameters.values()
    ours = ("reward_fn", "ideal_gains", "ref_scores", "generator", "teacher_scores", "ranks", "own")
    names = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in ours]
    for name in given:
        if name not in names:
            raise ValueError(f"{loss_type} has no hyper-parameter {name!r}; it has {', '.join(names) or 'none'}")
    scores = torch.zeros(1, max(2, *(v for v in (given.get("k"),) if type(v) is int), 2))
    gains = torch.zeros_like(scores).index_fill(-1, torch.tensor([0]), 1.0)
    more: dict[str, Any] = {
        name: scores for name in ("teacher_scores", "ref_scores") if name in {p.name for p in parameters}
    }
    if loss_type == "pg_rank":
        more |= {"generator": torch.Generator().manual_seed(0), "k": given.get("k", 2)}
    try:
        objective(scores, gains, scores == 0, **{**more, **given})
    except TypeError as error:
        raise ValueError(f"a hyper-parameter of {loss_type} has the wrong type, {dict(given)}: {error}") from None
    return dict(given)


def _stack_tokens(parts: Sequence[Tensor]) -> Tensor:
    """[M T H+1] of parts with different T, masked behind."""
    width = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(part, (0, 0, 0, width - part.shape[1])) for part in parts])


def _rows(features: Mapping[str, Any]) -> int:
    if "offsets" in features and features["input_ids"].ndim == 1:
        return len(features["offsets"])
    return len(features["input_ids"])
