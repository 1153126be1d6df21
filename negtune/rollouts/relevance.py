"""A judge of relevance made of a sampler, for `retrieval.relabel`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from negtune.rollouts.sampler import Prompt, Sampler, SamplingParams
from negtune.verifiers.relevance import parse_relevance, relevance_prompt, special_tokens
from negtune.verifiers.verdict import fingerprint

GREEDY = SamplingParams(temperature=0.0, max_tokens=256)


class SamplerJudge:
    """`(queries, documents) -> verdicts`, `positive`, `drop`, `negative`, or None where the model gave none.

    A completion that was cut at its length, that the engine failed to give, or that cannot be read is no verdict.

    Args:
        sampler: draws from the judge; it is never updated.
        model: what the judge is called, part of `name`.
        prompt: `(query, document, special=..., chat=...) -> prompt`.
        parse: completion to verdict or None.
        params: of the completions, greedy by default.

    `asked`, `cut`, `errors` and `unread` count completions: all, cut, failed in the engine, and not understood.
    """

    def __init__(
        self,
        sampler: Sampler,
        *,
        model: str,
        prompt: Callable[..., Prompt] = relevance_prompt,
        parse: Callable[[str], str | None] = parse_relevance,
        params: SamplingParams = GREEDY,
    ) -> None:
        self.sampler, self.model, self.params = sampler, model, params
        self.prompt, self.parse = prompt, parse
        self.asked = self.cut = self.errors = self.unread = 0
        self._special = special_tokens(sampler.tokenizer)
        self._chat = bool(getattr(sampler.tokenizer, "chat_template", None))

    @property
    def name(self) -> str:
        """Of the model, its weights, the prompt and the settings: verdicts of another name are another judge's."""
        settings = fingerprint([self.params, fingerprint(self.prompt), fingerprint(self.parse)])
        return f"{self.model}@{self.sampler.policy}/{settings.rpartition('-')[2]}"

    def __call__(self, queries: Sequence[str], documents: Sequence[str]) -> list[str | None]:
        prompts = [
            self.prompt(query, document, special=self._special, chat=self._chat)
            for query, document in zip(queries, documents, strict=True)
        ]
        verdicts: list[str | None] = []
        for rollout in self.sampler.sample(prompts, 1, self.params):
            ended = rollout.finish_reason == "stop"
            verdicts.append(self.parse(rollout.text) if ended else None)
            self.cut += rollout.finish_reason == "length"
            self.errors += rollout.finish_reason == "error"
            self.unread += ended and verdicts[-1] is None
        self.asked += len(prompts)
        return verdicts
