"""Rankings scored by what a frozen generator answers with their first documents in front of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from negtune.rollouts.sampler import Prompt, Sampler, SamplingParams
from negtune.verifiers.verdict import Verifier

GREEDY = SamplingParams(temperature=0.0, max_tokens=32)


def grounded_prompt(query: str, documents: Sequence[str]) -> Prompt:
    """One turn: the documents, best first, then the question."""
    passages = "\n".join(documents)
    return [{"role": "user", "content": f"{passages}\n\nAnswer in a few words, from the text above. {query}"}]


class GroundedReward:
    """A reward function for `RankingTrainer`: 1 where the generator answers rightly from the first documents, 0 where
    not, None where that is not known.

    The generator is frozen and answers greedily by default, so each query with the same first documents is asked
    once, whatever samples and epochs it comes up in: a reward costs no more than there are such sets.

    Args:
        sampler: draws from the generator; it is never updated.
        verifier: scores answers; columns of the data set (`answer`, ...) go to it.
        documents: how many of a ranking the generator sees; the trainer's `k` cannot be less.
        prompt: `(query, documents) -> prompt`.
        params: of the answers.
        score_truncated: score answers that were cut at `max_tokens` as they stand; else they are unscored.

    `asked` counts answers that were drawn, `unscored` those of them without a verdict.
    """

    def __init__(
        self,
        sampler: Sampler,
        verifier: Verifier,
        *,
        documents: int = 1,
        prompt: Callable[[str, Sequence[str]], Prompt] = grounded_prompt,
        params: SamplingParams = GREEDY,
        score_truncated: bool = False,
    ) -> None:
        if documents < 1:
            raise ValueError(f"documents must be at least 1, got {documents}")
        self.sampler, self.verifier, self.documents = sampler, verifier, documents
        self.prompt, self.params, self.score_truncated = prompt, params, score_truncated
        self.asked, self.unscored = 0, 0
        self._known: dict[tuple[str, ...], float | None] = {}

    def __call__(self, queries: Sequence[str], rankings: Sequence[Sequence[str]], **columns: Any) -> list[float | None]:
        keys = [(query, *ranking[: self.documents]) for query, ranking in zip(queries, rankings, strict=True)]
        for row, ranking in enumerate(rankings):
            if len(ranking) < self.documents:
                raise ValueError(
                    f"the generator is to see {self.documents} documents and ranking {row} has {len(ranking)}; "
                    "raise k, or lower documents"
                )
        fresh = {key: row for row, key in enumerate(keys) if key not in self._known}
        if fresh:
            self._ask(list(fresh), {name: [values[row] for row in fresh.values()] for name, values in columns.items()})
        return [self._known[key] for key in keys]

    def _ask(self, keys: Sequence[tuple[str, ...]], columns: dict[str, list[Any]]) -> None:
        prompts = [self.prompt(query, documents) for query, *documents in keys]
        rollouts = self.sampler.sample(prompts, 1, self.params)
        verdicts = self.verifier.verify(prompts, [rollout.text for rollout in rollouts], **columns)
        for key, rollout, verdict in zip(keys, rollouts, verdicts, strict=True):
            cut = rollout.finish_reason == "length" and not self.score_truncated
            known = None if cut or rollout.finish_reason == "error" else verdict.score
            self._known[key] = known
            self.unscored += known is None
        self.asked += len(keys)
