"""Mine candidate lists whose negatives are no false negatives: rules on scores, a cross-encoder, a language model.

Papers      NV-Retriever (margins), https://arxiv.org/abs/2407.15831; SimANS, https://arxiv.org/abs/2210.11773;
            RocketQA (a cross-encoder denoises), https://arxiv.org/abs/2010.08191; RLHN (a language model relabels),
            https://arxiv.org/abs/2505.16967
Data        --data FOLDER in BEIR's layout or a Hub id (BeIR/scifact), --split one of its judgements (train, which not
            all have); left out: made up.
Paper's     NV-Retriever keeps negatives up to .95 of the positive's score (for cosines here: --relative_margin .05, the
            same where the positive is above 0). RocketQA's threshold and SimANS's a and b: not checked.
Here        All positives are in; scores that a retriever lacks are computed; rules, cross-encoder, judge, then the cut.
Expected    Rules take out more of the positives, each hidden in turn, than of judged negatives. Where a query has many
            positives, the lowest of their scores is a limit that hardly a negative meets: --against max or mean.
Measured    recipes/README.md

    python recipes/retrieval/mine.py --config recipes/retrieval/mine.yaml --data FOLDER --relative_margin 0.05

Writes candidates.jsonl (`retrieval.mining.read_lists`) and mining.json: counts and audits. --judge asks a model about
unjudged candidates (verdicts.jsonl: what it said; the same command goes on there after a stop); its audit asks about
judged ones. It writes verdicts, or --judge_kind causal_lm, cross_encoder or bi_encoder scores documents: two thresholds
are fitted on the judged documents of half of the queries then, and the audit is of the other half. --pool_depth hides
judgements that the task has, and says how many relevant documents among them the judge found.
--smoke: a tiny encoder and a tiny judge, which says nothing.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from search_task import at_least
from trl import TrlParser

from negtune import HFSampler, SamplingParams, VLLMSampler, VLLMServerSampler
from negtune.cli.recipe import parsed, run_recipe
from negtune.data.retrieval import RetrievalTask, load_beir, split_queries, synthetic_retrieval
from negtune.metrics.judgement import JudgeAudit, judge_audit, share_of
from negtune.models.load import load_model, load_tokenizer
from negtune.models.reference import weights_hash
from negtune.records import write_json
from negtune.retrieval.choice import SimANS, choose
from negtune.retrieval.encoder import load_encoder
from negtune.retrieval.evaluation import scorer
from negtune.retrieval.mining import Mined, mine, write_lists
from negtune.retrieval.negatives import (
    EVERYTHING,
    AbsoluteMargin,
    MaxScore,
    MinScore,
    PercentOfPositive,
    RelativeMargin,
    Rule,
    add_scores,
    audit_rules,
    drop_negatives,
)
from negtune.retrieval.rankers import load_ranker
from negtune.retrieval.relabel import relabel
from negtune.retrieval.retrievers import BM25Retriever, DenseRetriever
from negtune.retrieval.score_judge import ScoreJudge, fit_thresholds, known_scores
from negtune.rollouts.relevance import SamplerJudge

SMOKE = {"retrievers": "tiny", "n_documents": 8, "depth": 20, "against": "max"}
SMOKE |= {"judge": "tiny", "judge_tokens": 4, "judge_depth": 10, "audit": 8}
SCORED = ("causal_lm", "cross_encoder", "bi_encoder", "multi_vector")
AGAIN = "run the same command again; what a judge said so far is in verdicts.jsonl"


@dataclass
class MineArguments:
    output_dir: str = field(default="runs/mine", metadata={"help": "Gets candidates.jsonl and mining.json."})
    data: str | None = field(default=None, metadata={"help": "Folder in BEIR's layout or a Hub id; default: made up."})
    split: str = field(default="train", metadata={"help": "Judgements whose queries are mined for."})
    retrievers: list[str] = field(default_factory=lambda: ["bm25", "minilm"], metadata={"help": "bm25, or encoders."})
    depth: int = field(default=100, metadata={"help": "Ranks asked of each retriever."})
    skip: int = field(default=0, metadata={"help": "First ranks of a retriever that are no negatives."})
    scorer: str | None = field(default=None, metadata={"help": "Retriever whose scores rules read; default: the last."})
    absolute_margin: float | None = field(default=None, metadata={"help": "Keep s_n <= s_p - this."})
    relative_margin: float | None = field(default=None, metadata={"help": "Keep s_n <= s_p - this times |s_p|."})
    percent_of_positive: float | None = field(default=None, metadata={"help": "Keep s_n <= this times s_p; 0 to 1."})
    min_score: float | None = field(default=None, metadata={"help": "Keep s_n >= this."})
    max_score: float | None = field(default=None, metadata={"help": "Keep s_n <= this."})
    against: str = field(default="min", metadata={"help": "Which positive s_p is: min, max or mean of the scores."})
    cross_encoder: str | None = field(default=None, metadata={"help": "Folder or Hub id; takes out what it finds."})
    threshold: float = field(default=0.1, metadata={"help": "Its `predict` above which a document is relevant."})
    judge: str | None = field(default=None, metadata={"help": "Model that relabels unjudged candidates."})
    judge_kind: str = field(
        default="written", metadata={"help": f"written: a language model's words; by score: {', '.join(SCORED)}."}
    )
    judge_precision: float = field(default=0.9, metadata={"help": "By score: of positives, where thresholds are fit."})
    judge_kept: float = field(default=0.9, metadata={"help": "By score: share of positives not called negative there."})
    judge_unjudged: str = field(
        default="leave_out", metadata={"help": "By score: in the fit; or irrelevant, counted as such."}
    )
    judge_engine: str = field(default="hf", metadata={"help": "Serves the judge: hf, vllm, or server with judge_url."})
    judge_url: str | None = field(default=None, metadata={"help": "http://host:port of a vLLM server."})
    judge_tokens: int = field(default=256, metadata={"help": "Most tokens of an answer; a cut one is no verdict."})
    judge_positives: str = field(default="relabel", metadata={"help": "Found positives: relabel or drop."})
    judge_depth: int | None = field(default=None, metadata={"help": "Judge lists cut to this length; None: whole."})
    pool_depth: int | None = field(
        default=None, metadata={"help": "Know judgements of BM25's first so many only, audit by those behind."}
    )
    audit: int = field(default=200, metadata={"help": "Judged documents that the judge is asked about, too."})
    n_documents: int = field(default=16, metadata={"help": "Of a list."})
    max_positives: int | None = field(default=None, metadata={"help": "Of a list; default: half of it."})
    select: str = field(default="top", metadata={"help": "Negatives: top, random or simans."})
    simans_a: float = field(default=100.0, metadata={"help": "p is exp(-a (s_n - s_p - b)^2); units of the scores."})
    simans_b: float = field(default=0.0, metadata={"help": "See simans_a."})
    seed: int = field(default=0, metadata={"help": "Of draws and of the order in lists."})
    smoke: bool = field(default=False, metadata={"help": "Tiny and quick, unless a flag says otherwise."})


def main() -> None:
    (given,) = parsed(TrlParser((MineArguments,)), SMOKE)
    rules, select, load_judge = checked(given)
    folder, half = Path(given.output_dir), max(1, given.n_documents // 2)
    folder.mkdir(parents=True, exist_ok=True)
    whole = task = load_beir(given.data, given.split, empty="keep") if given.data else synthetic_retrieval()
    if given.pool_depth is not None:
        task = whole.pooled(BM25Retriever(whole.corpus).retrieve(whole.queries, given.pool_depth))
    said: dict[str, Any] = {"arguments": vars(given), "queries": len(task.queries)}
    pool = searched(given, task)
    if rules:
        audited("rules", audit_rules(pool, rules), said)
        pool = drop_negatives(pool, rules)
    if given.cross_encoder:
        pool = add_scores(pool, load_ranker(given.cross_encoder, "cross_encoder"), name="cross_encoder")
        denoising: list[Rule] = [MaxScore("cross_encoder", given.threshold)]
        audited("cross_encoder", audit_rules(pool, denoising), said)
        pool = drop_negatives(pool, denoising)
    if given.judge:
        if given.judge_depth:
            pool = choose(pool, given.judge_depth, max_positives=given.judge_depth // 2, seed=given.seed)
        relabelled = by_words if given.judge_kind == "written" else by_scores
        before = pool
        pool, queries = relabelled(given, pool, load_judge(), task, said)
        if given.pool_depth is not None:
            said["judge"]["hidden"] = hidden = hidden_audit(before, pool, whole, queries)
            print("candidates without a judgement, by the judgements that were hidden:", *hidden.lines(), sep="\n")
    mined = choose(pool, given.n_documents, max_positives=given.max_positives or half, select=select, seed=given.seed)
    said["counts"] = mined.counts()
    write_lists(folder / "candidates.jsonl", mined.lists)
    write_json(folder / "mining.json", said)
    print("\n".join(f"{name}: {number}" for name, number in mined.counts().items()))


def by_words(
    given: MineArguments, pool: Mined, sampler: Any, task: RetrievalTask, said: dict[str, Any]
) -> tuple[Mined, Any]:
    """The lists with what a language model writes of them, and the queries whose audits mean something: all."""
    params = SamplingParams(temperature=0.0, max_tokens=given.judge_tokens)
    judge = SamplerJudge(sampler, model=given.judge, params=params)
    found = relabelled_by(judge, given, pool, said)
    sampler.close()
    print(f"of {judge.asked} answers {judge.cut} cut, {judge.errors} failed, {judge.unread} not read")
    return found, task.queries


def by_scores(
    given: MineArguments, pool: Mined, ranker: Any, task: RetrievalTask, said: dict[str, Any]
) -> tuple[Mined, Any]:
    """The lists with what scores say of them, and the queries whose audits mean something: those that thresholds were
    not fitted on."""
    fitted, held = split_queries(task, 0.5, given.seed)
    known = known_scores(pool.lists, scorer(ranker, 16), queries=fitted.queries, unjudged=given.judge_unjudged)
    fit = fit_thresholds(*known, precision=given.judge_precision, kept=given.judge_kept)
    said["fit"] = asdict(fit)
    print(f"positive from {fit.thresholds.positive:.4g}, negative below {fit.thresholds.drop:.4g}")
    print(f"where they were fitted: precision {share_of(fit.precision)}, recall {share_of(fit.recall)}", flush=True)
    judge = ScoreJudge(ranker, fit.thresholds, model=given.judge)
    return relabelled_by(judge, given, pool, said, held.queries), held.queries


def relabelled_by(judge: Any, given: MineArguments, pool: Mined, said: dict[str, Any], queries: Any = None) -> Mined:
    """The lists with a judge's labels, audited on `queries`."""
    found = relabel(
        pool,
        judge,
        **{"name": judge.name, "positives": given.judge_positives, "audit": given.audit, "audit_queries": queries},
        **{"cache": Path(given.output_dir) / "verdicts.jsonl", "seed": given.seed},
    )
    said["judge"] = {**found.counts, "name": judge.name, "audit": found.audit}
    print(f"judge {judge.name}: {found.counts}")
    print("\n".join(found.audit.lines() if found.audit else ["no judged document to audit the judge by"]))
    return found.mined


def hidden_audit(before: Mined, after: Mined, whole: RetrievalTask, queries: Any) -> JudgeAudit:
    """What was said of unjudged candidates against all judgements of the task; what has none is irrelevant."""
    new = {one.query_id: dict(zip(one.document_ids, one.relabelled, strict=True)) for one in after.lists}
    truth, verdicts = [], []
    for one in (one for one in before.lists if one.query_id in queries):
        marks = new.get(one.query_id, {}) | after.dropped.get(one.query_id, {})
        positives = whole.positives(one.query_id)
        for document_id, known in zip(one.document_ids, one.judged, strict=True):
            if not known:
                truth.append(document_id in positives)
                verdicts.append((marks.get(document_id) or "").partition(":")[0] or None)
    return judge_audit(truth, verdicts)


def checked(given: MineArguments) -> tuple[list[Rule], str | SimANS, Any]:
    """The rules of the flags, how negatives are chosen, and what loads the judge; before anything is loaded.

    Raises:
        ValueError: naming the flag.
    """
    names = [name_of(name) for name in given.retrievers]
    by = given.scorer or names[-1]
    if by not in names:
        raise ValueError(f"--scorer {by} is none of the retrievers {', '.join(names)}")
    if given.select not in ("top", "random", "simans"):
        raise ValueError(f"--select must be top, random or simans, got {given.select!r}")
    at_least(given, n_documents=2, pool_depth=1, max_positives=1, judge_tokens=1, audit=0, skip=0)
    if given.judge_depth is not None and given.judge_depth < max(given.n_documents, 2):
        raise ValueError(f"--judge_depth {given.judge_depth} is less than the {given.n_documents} of --n_documents")
    if given.max_positives is not None and given.max_positives >= given.n_documents:
        raise ValueError(
            f"--max_positives {given.max_positives} leaves no negative in --n_documents {given.n_documents}"
        )
    if given.judge_positives not in ("relabel", "drop"):
        raise ValueError(f"--judge_positives must be relabel or drop, got {given.judge_positives!r}")
    if given.threshold != given.threshold:
        raise ValueError("--threshold is a score of the cross-encoder, got nan")
    relative = (AbsoluteMargin, RelativeMargin, PercentOfPositive)
    sizes = (given.absolute_margin, given.relative_margin, given.percent_of_positive)
    rules: list[Rule] = [
        make(by, size, against=given.against) for make, size in zip(relative, sizes, strict=True) if size is not None
    ]
    rules += [MinScore(by, given.min_score)] if given.min_score is not None else []
    rules += [MaxScore(by, given.max_score)] if given.max_score is not None else []
    simans = SimANS(by, given.simans_a, given.simans_b, given.against)
    return rules, simans if given.select == "simans" else given.select, judge_of(given)


def judge_of(given: MineArguments) -> Any:
    """What loads the judge: a sampler, or a ranker."""
    if given.judge_kind not in ("written", *SCORED):
        raise ValueError(f"--judge_kind must be written, {', '.join(SCORED[:-1])} or {SCORED[-1]}")
    if given.judge_engine not in ("hf", "vllm", "server"):
        raise ValueError(f"--judge_engine must be hf, vllm or server, got {given.judge_engine!r}")
    if given.judge_kind != "written":
        if given.judge is None:
            raise ValueError(f"--judge_kind {given.judge_kind} needs --judge, the model that scores")
        if given.judge_engine != "hf":
            raise ValueError(
                f"--judge_engine {given.judge_engine} serves written verdicts; --judge_kind {given.judge_kind} runs "
                "here, leave it out"
            )
        for name in ("judge_precision", "judge_kept"):
            if not 0 < getattr(given, name) <= 1:
                raise ValueError(f"--{name} must be above 0 and at most 1, got {getattr(given, name)}")
        if given.judge_unjudged not in ("leave_out", "irrelevant"):
            raise ValueError(f"--judge_unjudged must be leave_out or irrelevant, got {given.judge_unjudged!r}")
        return lambda: load_ranker(given.judge, given.judge_kind)
    if given.judge_engine == "server":
        if not given.judge_url:
            raise ValueError("--judge_engine server needs --judge_url http://host:port")
        return lambda: VLLMServerSampler(given.judge, load_tokenizer(given.judge), given.judge_url)
    engine = HFSampler if given.judge_engine == "hf" else VLLMSampler

    def load() -> Any:
        model, tokenizer = load_model(given.judge)
        return engine(model, tokenizer, policy=weights_hash(model)[:12])

    return load


def searched(given: MineArguments, task: RetrievalTask) -> Mined:
    """All that the retrievers found and all positives, with every score that an encoder can give."""
    retrievers: list[Any] = []
    scorers = {}
    for name in given.retrievers:
        if name == "bm25":
            retrievers.append(BM25Retriever(task.corpus))
            continue
        model = load_encoder(name)
        retrievers.append(DenseRetriever(model, task.corpus, name=name_of(name)))
        scorers[name_of(name)] = scorer(model)
    settings = {"depth": given.depth, "skip": given.skip, "positives": "guaranteed", "seed": given.seed}
    pool = mine(task, retrievers, n_documents=EVERYTHING, **settings)
    for name, score in scorers.items():
        pool = add_scores(pool, score, name=name)
    return pool


def name_of(encoder: str) -> str:
    """Of its ranks and scores: the last part of a path or id."""
    return encoder.rstrip("/").rpartition("/")[2]


def audited(name: str, found: Any, said: dict[str, Any]) -> None:
    """Print an audit of rules, and keep it."""
    said[name] = asdict(found)
    print(f"{name} would take out, of positives if they were not judged: {share_of(found.positives)}")
    print(f"{name} would take out, of judged negatives: {share_of(found.negatives)}", flush=True)


if __name__ == "__main__":
    run_recipe(main, AGAIN)
