"""Similarity by label: against a loop over pairs, and on states whose answer is known."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from benchmarks.overoptimization.similarity import HIGH, LOW, NEITHER, halves, similarity


def looped(
    hidden_NP: np.ndarray, label_N: np.ndarray, prompt_N: np.ndarray, within: bool
) -> tuple[float, float, int, int]:
    found: dict[bool, list[float]] = {True: [], False: []}
    for i, j in combinations(range(len(label_N)), 2):
        if NEITHER in (label_N[i], label_N[j]) or (prompt_N[i] == prompt_N[j]) != within:
            continue
        cosine = hidden_NP[i] @ hidden_NP[j] / np.linalg.norm(hidden_NP[i]) / np.linalg.norm(hidden_NP[j])
        found[bool(label_N[i] == label_N[j])].append(float(cosine))
    same, different = found[True], found[False]
    return sum(same) / len(same), sum(different) / len(different), len(same), len(different)


@pytest.mark.parametrize("within", [True, False])
def test_sums_of_vectors_give_the_means_over_pairs(within: bool) -> None:
    random = np.random.default_rng(0)
    prompt_N = random.permutation(np.repeat(np.arange(5), 6))
    label_N = random.integers(-1, 2, 30).astype(np.int8)
    hidden_LNP = random.normal(size=(3, 30, 7)) + 0.5
    found = similarity(hidden_LNP, label_N, prompt_N, within_prompts=within)
    for layer in range(3):
        same, different, same_pairs, different_pairs = looped(hidden_LNP[layer], label_N, prompt_N, within)
        assert (found.same_pairs, found.different_pairs) == (same_pairs, different_pairs)
        assert found.same_L[layer] == pytest.approx(same, abs=1e-12)
        assert found.different_L[layer] == pytest.approx(different, abs=1e-12)
        assert found.difference_L[layer] == pytest.approx(same - different, abs=1e-12)


def labelled(signal: float, *, prompts: int = 60, noise: float = 0.3) -> tuple[np.ndarray, ...]:
    """Each state is its prompt's topic, `signal` along or against one direction by its label, and noise.

    All of these parts are orthogonal in expectation, and a topic has length 1.
    """
    random = np.random.default_rng(1)
    width, group = 64, 4
    prompt_N = np.repeat(np.arange(prompts), group)
    label_N = np.tile(np.array([HIGH, HIGH, LOW, LOW], dtype=np.int8), prompts)
    topic_GP = random.normal(size=(prompts, width))
    topic_GP[:, 0] = 0.0
    topic_GP /= np.linalg.norm(topic_GP, axis=1, keepdims=True)
    hidden_NP = topic_GP[prompt_N] + noise * random.normal(size=(len(prompt_N), width)) / np.sqrt(width)
    hidden_NP[:, 0] += np.where(label_N == HIGH, signal, -signal)
    return hidden_NP, label_N, prompt_N


def test_a_layer_that_knows_gold_is_told_from_one_that_does_not() -> None:
    blind, label_N, prompt_N = labelled(0.0)
    seeing, _, _ = labelled(0.5)
    hidden_LNP = np.stack([blind, seeing])
    # Squared length 1 + signal² + noise²; of it 1 is shared within a prompt and ± signal² by label.
    square = 1 + 0.25 + 0.09  # The rest, within .01, is what 60 prompts draw by chance.
    outside = similarity(hidden_LNP, label_N, prompt_N, within_prompts=False)
    assert outside.same_L == pytest.approx([0.0, 0.25 / square], abs=0.01)
    assert outside.different_L == pytest.approx([0.0, -0.25 / square], abs=0.01)
    inside = similarity(hidden_LNP, label_N, prompt_N, within_prompts=True)
    assert inside.same_L == pytest.approx([1 / 1.09, 1.25 / square], abs=0.01)
    assert inside.difference_L == pytest.approx([0.0, 0.5 / square], abs=0.01)
    assert (inside.same_pairs, inside.different_pairs) == (60 * 2, 60 * 4)


def test_halves_are_those_of_each_prompt() -> None:
    gold_N = np.array([3.0, 1.0, 2.0, -1.0, 9.0, 9.0, 7.0, 5.0, 5.0])
    prompt_N = np.array([0, 0, 0, 0, 1, 1, 1, 2, 2])
    # Medians 1.5, 9 and 5.
    expected = [HIGH, LOW, HIGH, LOW, NEITHER, NEITHER, LOW, NEITHER, NEITHER]
    assert halves(gold_N, prompt_N).tolist() == expected


def test_what_cannot_be_compared_is_refused() -> None:
    hidden_NP, label_N, prompt_N = labelled(0.5, prompts=2)
    with pytest.raises(ValueError, match="0 pairs of the same label and 2 of different"):
        similarity(
            hidden_NP[None, [0, 2, 4, 6]], label_N[[0, 2, 4, 6]], prompt_N[::2][:4], within_prompts=True
        )
    broken = hidden_NP.copy()
    broken[3] = 0.0
    with pytest.raises(ValueError, match="zero or not finite"):
        similarity(broken[None], label_N, prompt_N, within_prompts=True)
    with pytest.raises(ValueError, match="not finite"):
        halves(np.array([1.0, np.nan]), np.array([0, 0]))
