"""Masked reductions, and tiles of logits that equal the whole."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from negtune.ops import (
    MissingReferenceError,
    SequenceLogps,
    TokenDistributions,
    masked_mean,
    masked_sum,
    needs,
    needs_of,
    scatter_tokens,
    tiled_token_values,
    token_logps,
)

VOCABULARY, WIDTH = 7, 4


@dataclass
class TinyHead:
    """logits = hidden @ weight."""

    weight: Tensor

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[1]

    @property
    def trainable(self) -> bool:
        return self.weight.requires_grad

    def __call__(self, hidden: Tensor) -> Tensor:
        return hidden @ self.weight


def entropy_gap(logits: Tensor, targets: Tensor, ref_logits: Tensor | None) -> Tensor:
    """A function of the whole row, nonlinear in the logits, with a reference."""
    distribution = logits.softmax(-1)
    reference = 0.0 if ref_logits is None else (distribution * ref_logits).sum(-1)
    return (distribution**2).sum(-1) * token_logps(logits, targets) + reference


def make(rows: int, *, trainable: bool, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, ref_hidden = draw(rows, WIDTH).requires_grad_(), draw(rows, WIDTH)
    head, ref_head = TinyHead(draw(WIDTH, VOCABULARY).requires_grad_(trainable)), TinyHead(draw(WIDTH, VOCABULARY))
    targets = torch.randint(VOCABULARY, (rows,), generator=generator)
    return hidden, targets, head, ref_hidden, ref_head, draw(rows)


def test_masked_reductions_by_hand():
    values = torch.tensor([[1.0, 2.0, torch.nan], [3.0, torch.inf, -99.0], [torch.nan, 0.0, 99.0]])
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    assert masked_sum(values, mask).tolist() == [3, 3, 0]
    assert masked_mean(values, mask).tolist() == [1.5, 3, 0]
    sequence = SequenceLogps(values, mask, values + mask.float())
    assert sequence.lengths.tolist() == [2, 1, 0]
    assert sequence.sums.tolist() == [3, 3, 0]
    assert sequence.means.tolist() == [1.5, 3, 0]
    assert sequence.log_ratio.tolist() == [-2, -1, 0]


def test_log_ratio_without_a_reference_says_what_to_pass():
    ones = torch.ones(1, 1)
    with pytest.raises(MissingReferenceError, match="pass reference="):
        _ = SequenceLogps(ones, ones.bool()).log_ratio
    distributions = TokenDistributions(torch.ones(1, 2), torch.tensor([0]), ones.bool(), TinyHead(torch.ones(2, 3)))
    with pytest.raises(MissingReferenceError, match="pass reference="):
        distributions.map_with_reference(entropy_gap)


def test_scatter_lays_tokens_out_row_by_row():
    mask = torch.tensor([[False, True, True], [False, False, False], [True, False, True]])
    values = torch.tensor([1.0, 2.0, 3.0, 4.0], requires_grad=True)
    laid_out = scatter_tokens(values, mask)
    assert laid_out.tolist() == [[0, 1, 2], [0, 0, 0], [3, 0, 4]]
    (laid_out * torch.tensor([[5.0, 6.0, 7.0]] * 3)).sum().backward()
    assert values.grad.tolist() == [6, 7, 5, 7]


def test_token_logps_by_hand_and_in_the_wider_dtype():
    # logits log 1, log 2, log 5 -> probabilities 1/8, 2/8, 5/8
    logits = torch.tensor([[1.0, 2.0, 5.0]], dtype=torch.float64).log()
    assert_close(token_logps(logits, torch.tensor([1])).exp(), torch.tensor([0.25], dtype=torch.float64))
    assert token_logps(logits.bfloat16(), torch.tensor([1])).dtype == torch.float32


@pytest.mark.parametrize("trainable", [False, True], ids=["frozen head", "trainable head"])
@pytest.mark.parametrize("rows_per_tile", [1, 2, 5, 100])
def test_tiles_equal_the_whole_in_value_and_gradient(trainable, rows_per_tile):
    hidden, targets, head, ref_hidden, ref_head, upstream = make(5, trainable=trainable)
    leaves = [hidden, head.weight] if trainable else [hidden]

    expected = entropy_gap(head(hidden), targets, ref_head(ref_hidden))
    expected_gradients = torch.autograd.grad((expected * upstream).sum(), leaves)
    actual = tiled_token_values(
        entropy_gap,
        hidden,
        targets,
        head,
        ref_hidden=ref_hidden,
        ref_head=ref_head,
        tile_elements=rows_per_tile * VOCABULARY,
    )
    gradients = torch.autograd.grad((actual * upstream).sum(), leaves)

    assert_close(actual, expected, rtol=1e-14, atol=1e-14)
    for gradient, expected_gradient in zip(gradients, expected_gradients, strict=True):
        assert_close(gradient, expected_gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("trainable", [False, True])
def test_gradcheck_towards_hidden_states_and_head(trainable):
    hidden, targets, head, ref_hidden, ref_head, _ = make(3, trainable=trainable)

    def value(hidden: Tensor, weight: Tensor) -> Tensor:
        return tiled_token_values(
            entropy_gap,
            hidden,
            targets,
            TinyHead(weight),
            ref_hidden=ref_hidden,
            ref_head=ref_head,
            tile_elements=2 * VOCABULARY,
        )

    assert torch.autograd.gradcheck(value, (hidden, head.weight))


@pytest.mark.parametrize("trainable", [False, True])
def test_no_scored_token_keeps_the_graph_connected(trainable):
    hidden, targets, head, _, _, _ = make(0, trainable=trainable)
    mask = torch.zeros(2, 3, dtype=torch.bool)
    values = TokenDistributions(hidden, targets, mask, head).map(entropy_gap)
    assert values.shape == (2, 3)
    assert not values.any()
    values.sum().backward()
    assert hidden.grad.shape == (0, WIDTH)
    if trainable:
        assert not head.weight.grad.any()


def test_no_tile_holds_more_logits_than_asked_for():
    hidden, targets, head, _, _, _ = make(5, trainable=False)
    sizes = []

    def watch(logits: Tensor, targets: Tensor, ref_logits: Tensor | None) -> Tensor:
        sizes.append(logits.numel())
        return token_logps(logits, targets)

    tiled_token_values(watch, hidden, targets, head, tile_elements=2 * VOCABULARY + 1)
    assert sizes == [2 * VOCABULARY, 2 * VOCABULARY, VOCABULARY]
    sizes.clear()
    tiled_token_values(watch, hidden, targets, head, tile_elements=1)  # never less than one row
    assert sizes == [VOCABULARY] * 5


def test_without_gradients_a_function_may_return_several_values_per_token():
    hidden, targets, head, _, _, _ = make(5, trainable=False)

    def two_values(logits: Tensor, targets: Tensor, ref_logits: Tensor | None) -> Tensor:
        return torch.stack([token_logps(logits, targets), logits.amax(-1)], -1)

    with torch.no_grad():
        tiled = tiled_token_values(two_values, hidden, targets, head, tile_elements=2 * VOCABULARY)
        assert_close(tiled, two_values(head(hidden), targets, None))


@pytest.mark.parametrize("trainable", [False, True])
def test_the_reference_gets_no_gradient(trainable):
    hidden, targets, head, ref_hidden, ref_head, _ = make(3, trainable=trainable)
    ref_hidden.requires_grad_()
    ref_head.weight.requires_grad_()
    distributions = TokenDistributions(hidden, targets, torch.ones(1, 3).bool(), head, ref_hidden, ref_head)
    distributions.map_with_reference(entropy_gap).sum().backward()
    assert hidden.grad is not None
    assert ref_hidden.grad is None
    assert ref_head.weight.grad is None


def test_needs_see_through_partial_and_name_the_sides():
    @needs(reference=True)
    def objective(forget, alternative, *, beta=0.1):
        return forget, alternative, beta

    declared = needs_of(partial(objective, beta=0.5))
    assert declared.reference
    assert not declared.distributions
    assert declared.sides == {"forget", "alternative"}
    assert not needs_of(lambda retain: retain).reference


def test_an_objective_that_reads_activations_must_name_its_layer():
    @needs(activations=True)
    def objective(forget):
        return forget

    with pytest.raises(ValueError, match="needs a keyword layer with a whole number"):
        needs_of(objective)
