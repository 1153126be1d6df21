"""Mine candidate lists whose negatives are no false negatives: rules on scores, a cross-encoder, a language model.

Papers      NV-Retriever (margins), https://arxiv.org/abs/2407.15831; SimANS, https://arxiv.org/abs/2210.11773;
            RocketQA (a cross-encoder denoises), https://arxiv.org/abs/2010.08191; RLHN (a language model relabels),
            https://arxiv.org/abs/2505.16967
Data        --data FOLDER in BEIR's layout or a Hub id (BeIR/scifact); left out: made up.
Paper's     NV-Retriever keeps negatives up to .95 of the positive's score (for cosines here: --relative_margin .05, the
            same where the positive is above 0). RocketQA's threshold and SimANS's a and b: not checked.
Here        All positives are in; scores that a retriever lacks are computed; rules, cross-encoder, judge, then the cut.
Expected    Rules take out more of the positives, each hidden in turn, than of judged negatives. Where a query has many
            positives, the lowest of their scores is a limit that hardly a negative meets: --against max or mean.
Measured    recipes/README.md

    python recipes/retrieval/mine.py --config recipes/retrieval/mine.yaml --data FOLDER --relative_margin 0.05

Writes candidates.jsonl (`retrieval.mining.read_lists`) and mining.json: counts and audits. --judge asks a language
model about unjudged candidates (verdicts.jsonl: what it said; the same command goes on there after a stop); its audit
asks about judged ones. --smoke: a tiny encoder and a tiny judge, which says nothing.
"""

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trl import TrlParser

from negtune import HFSampler, SamplingParams, VLLMSampler, VLLMServerSampler
from negtune.cli.recipe import parsed, run_recipe
from negtune.data.retrieval import RetrievalTask, load_beir, synthetic_retrieval
from negtune.metrics.judgement import share_of
from negtune.models.load import load_model, load_tokenizer
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
from negtune.rollouts.relevance import SamplerJudge

SMOKE = {"retrievers": "tiny", "n_documents": 8, "depth": 20, "against": "max"}
SMOKE |= {"judge": "tiny", "judge_tokens": 4, "judge_depth": 10, "audit": 8}
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
    judge: str | None = field(default=None, metadata={"help": "Language model that relabels unjudged candidates."})
    judge_engine: str = field(default="hf", metadata={"help": "Serves the judge: hf, vllm, or server with judge_url."})
    judge_url: str | None = field(default=None, metadata={"help": "http://host:port of a vLLM server."})
    judge_tokens: int = field(default=256, metadata={"help": "Most tokens of an answer; a cut one is no verdict."})
    judge_positives: str = field(default="relabel", metadata={"help": "Found positives: relabel or drop."})
    judge_depth: int | None = field(default=None, metadata={"help": "Judge lists cut to this length; None: whole."})
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
    rules, select, judge_sampler = checked(given)
    folder, half = Path(given.output_dir), max(1, given.n_documents // 2)
    folder.mkdir(parents=True, exist_ok=True)
    task = load_beir(given.data, given.split, empty="keep") if given.data else synthetic_retrieval()
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
        sampler = judge_sampler()
        judge = SamplerJudge(
            sampler, model=given.judge, params=SamplingParams(temperature=0.0, max_tokens=given.judge_tokens)
        )
        found = relabel(
            pool,
            judge,
            **{"name": judge.name, "positives": given.judge_positives, "audit": given.audit},
            **{"cache": folder / "verdicts.jsonl", "seed": given.seed},
        )
        pool, said["judge"] = found.mined, {**found.counts, "name": judge.name, "audit": found.audit}
        sampler.close()
        print(f"judge {judge.name}: {found.counts}; {judge.cut} cut, {judge.errors} failed, {judge.unread} not read")
        print("\n".join(found.audit.lines() if found.audit else ["no judged document to audit the judge by"]))
    mined = choose(pool, given.n_documents, max_positives=given.max_positives or half, select=select, seed=given.seed)
    said["counts"] = mined.counts()
    write_lists(folder / "candidates.jsonl", mined.lists)
    write_json(folder / "mining.json", said)
    print("\n".join(f"{name}: {number}" for name, number in mined.counts().items()))


def checked(given: MineArguments) -> tuple[list[Rule], str | SimANS, Any]:
    """The rules of the flags, how negatives are chosen, and what makes the judge's sampler; before anything is loaded.

    Raises:
        ValueError: naming the flag.
    """
    names = [name_of(name) for name in given.retrievers]
    by = given.scorer or names[-1]
    if by not in names:
        raise ValueError(f"--scorer {by} is none of the retrievers {', '.join(names)}")
    if given.select not in ("top", "random", "simans"):
        raise ValueError(f"--select must be top, random or simans, got {given.select!r}")
    if given.n_documents < 2:
        raise ValueError(f"--n_documents must be at least 2, got {given.n_documents}")
    if given.judge_depth is not None and given.judge_depth < max(given.n_documents, 2):
        raise ValueError(f"--judge_depth {given.judge_depth} is less than the {given.n_documents} of --n_documents")
    relative = (AbsoluteMargin, RelativeMargin, PercentOfPositive)
    sizes = (given.absolute_margin, given.relative_margin, given.percent_of_positive)
    rules: list[Rule] = [
        make(by, size, against=given.against) for make, size in zip(relative, sizes, strict=True) if size is not None
    ]
    rules += [MinScore(by, given.min_score)] if given.min_score is not None else []
    rules += [MaxScore(by, given.max_score)] if given.max_score is not None else []
    simans = SimANS(by, given.simans_a, given.simans_b, given.against)
    return rules, simans if given.select == "simans" else given.select, sampler_of(given)


def sampler_of(given: MineArguments) -> Any:
    """What loads the judge."""
    if given.judge_engine not in ("hf", "vllm", "server"):
        raise ValueError(f"--judge_engine must be hf, vllm or server, got {given.judge_engine!r}")
    if given.judge_engine == "server":
        if not given.judge_url:
            raise ValueError("--judge_engine server needs --judge_url http://host:port")
        return lambda: VLLMServerSampler(given.judge, load_tokenizer(given.judge), given.judge_url)
    engine = HFSampler if given.judge_engine == "hf" else VLLMSampler
    return lambda: engine(*load_model(given.judge))


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
