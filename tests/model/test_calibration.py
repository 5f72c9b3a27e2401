"""Calibration data: every shape users pass, and clear refusals of what cannot calibrate."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptq_backend import CalibrationError
from gptq_backend.model.calibration import (
    held_out_windows,
    make_batches,
    output_mask,
    sample_windows,
    split_windows,
    tokenize,
)


def words(text: str) -> dict[str, list[int]]:
    """A tokenizer: the length of each word."""
    return {"input_ids": [len(word) for word in text.split()]}


def test_texts_are_joined_and_cut_into_windows() -> None:
    samples = tokenize(["a bb ccc", "dddd e"], words, seqlen=2)
    assert [sample.tolist() for sample in samples] == [[1, 2], [3, 4]]
    assert all(sample.dtype == torch.long for sample in samples)


class Beginning:
    """A tokenizer that begins every text with token 0."""

    bos_token_id = 0

    def __call__(self, text: str) -> dict[str, list[int]]:
        return {"input_ids": [0, *words(text)["input_ids"]]}


def test_every_window_begins_as_the_tokenizer_begins_a_text() -> None:
    samples = tokenize("a bb ccc dddd e", Beginning(), seqlen=3)
    assert [sample.tolist() for sample in samples] == [[0, 1, 2], [0, 3, 4]]
    assert split_windows([0, 1, 2], 1, Beginning()) == [[0], [1], [2]], "nothing but the beginning would be left"
    assert split_windows([1, 2, 3, 4], 2, Beginning()) == [[1, 2], [3, 4]], "it was told not to"


def test_without_seqlen_each_text_is_a_sample_and_blank_ones_are_skipped() -> None:
    assert [sample.tolist() for sample in tokenize(["a bb", "  ", "ccc"], words)] == [[1, 2], [3]]


@pytest.mark.parametrize("count", [1, 3, 100])
def test_windows_set_aside_are_none_of_those_drawn(count: int) -> None:
    text = " ".join("x" * i for i in range(1, 41))
    drawn = {tuple(s.tolist()) for s in tokenize(text, words, seqlen=2, samples=15, seed=3)}
    aside = {tuple(s.tolist()) for s in held_out_windows(text, words, 2, 15, 3, count)}
    assert len(aside) == min(count, 5)
    assert not aside & drawn


def test_one_text_is_not_a_list_of_letters() -> None:
    assert [sample.tolist() for sample in tokenize("a bb", words)] == [[1, 2]]


def test_samples_are_drawn_by_seed_without_replacement_in_order() -> None:
    text = " ".join("x" * i for i in range(1, 41))
    draw = [tuple(s.tolist()) for s in tokenize(text, words, seqlen=2, samples=5, seed=3)]
    assert draw == [tuple(s.tolist()) for s in tokenize(text, words, seqlen=2, samples=5, seed=3)]
    assert draw == sorted(set(draw))
    assert len(draw) == 5
    assert draw != [tuple(s.tolist()) for s in tokenize(text, words, seqlen=2, samples=5, seed=4)]
    assert len(tokenize(text, words, seqlen=2, samples=999)) == 20


def test_drawing_leaves_torchs_random_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    tokenize(" ".join(["a"] * 40), words, seqlen=2, samples=5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("texts", [[], "", ["", "  \n"]])
def test_no_text_is_refused(texts: Any) -> None:
    with pytest.raises(CalibrationError, match="empty"):
        tokenize(texts, words)


def test_text_shorter_than_a_window_says_how_short() -> None:
    with pytest.raises(CalibrationError, match="3 tokens.*seqlen=8"):
        tokenize("a b c", words, seqlen=8)


@pytest.mark.parametrize(
    "samples",
    [
        [torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6])],
        [[1, 2, 3], [4, 5, 6]],
        [torch.tensor([[1, 2, 3], [4, 5, 6]])],
        torch.tensor([[1, 2, 3], [4, 5, 6]]),
        [{"input_ids": [1, 2, 3]}, {"input_ids": torch.tensor([[4, 5, 6]])}],
        [{"input_ids": [1, 2, 3], "attention_mask": None}, {"input_ids": [4, 5, 6]}],
    ],
)
def test_every_kind_of_sample_becomes_the_same_batch(samples: Any) -> None:
    (batch,) = make_batches(samples)
    assert batch.keys() == {"input_ids"}
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 5, 6]]


def test_samples_of_different_lengths_are_never_padded() -> None:
    batches = make_batches([[1], [1, 2, 3], [4, 5, 6], [7, 8]])
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(2, 3), (1, 2), (1, 1)]


def test_masks_stay_with_their_samples() -> None:
    batches = make_batches(
        [{"input_ids": [1, 2], "attention_mask": [1, 0]}, [3, 4], {"input_ids": [5, 6], "attention_mask": [0, 1]}]
    )
    masked = next(batch for batch in batches if "attention_mask" in batch)
    assert masked["input_ids"].tolist() == [[1, 2], [5, 6]]
    assert masked["attention_mask"].tolist() == [[1, 0], [0, 1]]


def test_rows_of_padding_are_left_out_and_segment_numbers_are_no_weights() -> None:
    (batch,) = make_batches({"input_ids": [[1, 2], [3, 4], [5, 6]], "attention_mask": [[1, 2], [0, 0], [0, 3]]})
    assert batch["input_ids"].tolist() == [[1, 2], [5, 6]]
    assert batch["attention_mask"].tolist() == [[1, 1], [0, 1]]


@pytest.mark.parametrize("count", [0, -1])
def test_drawing_no_samples_is_refused(count: int) -> None:
    with pytest.raises(CalibrationError, match=f"samples={count} must be positive"):
        sample_windows([1, 2, 3], count)


@pytest.mark.parametrize(("length", "size", "expected"), [(512, None, 4), (4096, None, 1), (512, 3, 3)])
def test_batch_sizes(length: int, size: int | None, expected: int) -> None:
    batches = make_batches([torch.zeros(length, dtype=torch.long)] * 9, size)
    assert max(batch["input_ids"].shape[0] for batch in batches) == expected
    assert sum(batch["input_ids"].shape[0] for batch in batches) == 9


@pytest.mark.parametrize(
    ("samples", "message"),
    [
        ([], "empty"),
        ([[]], "empty"),
        (["a text"], "sample 0 is a str"),
        ([[1, 2], None], "sample 1 is a NoneType"),
        ([{}], "sample 0 is a dict"),
        ([{"input_ids": [1], "pictures": object()}], "sample 0 is a dict"),
        ([torch.rand(3)], "sample 0 has dtype torch.float32"),
        ([torch.zeros(1, 2, 3, dtype=torch.long)], r"shape \(1, 2, 3\)"),
        ([{"input_ids": [[1, 2], [3, 4]], "attention_mask": [1, 1]}], r"attention_mask of shape \(1, 2\).*\(2, 2\)"),
        ([{"input_ids": [1, 2, 3], "attention_mask": [1, 1]}], r"attention_mask of shape \(1, 2\).*\(1, 3\)"),
        ([{"input_ids": [1, 2], "attention_mask": [0, 0]}], "empty"),
    ],
)
def test_what_is_not_token_ids_is_refused_by_position(samples: list[Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        make_batches(samples)


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_size_that_holds_nothing_is_refused(size: int) -> None:
    with pytest.raises(CalibrationError, match=f"batch_size={size} must be positive"):
        make_batches([torch.arange(4)], batch_size=size)


ids = st.lists(st.integers(0, 99), min_size=1, max_size=20)


@given(flat=ids, kind=st.sampled_from([list, tuple, torch.tensor, np.array, np.int64, iter]))
def test_a_flat_sequence_of_ids_is_refused_whatever_holds_it(flat: list[int], kind: Any) -> None:
    flat = [kind(each) for each in flat] if kind is np.int64 else kind(flat)
    samples = list(flat) if kind is iter else flat
    with pytest.raises(CalibrationError, match=r"sample 0 is one number .*pass it in a list: \[ids\]"):
        make_batches(samples)


@given(rows=st.lists(ids, min_size=1, max_size=5), data=st.data())
def test_one_number_among_sequences_is_refused_and_named(rows: list[list[int]], data: st.DataObject) -> None:
    make = data.draw(st.sampled_from([lambda row: row, torch.tensor, np.array, lambda row: {"input_ids": row}]))
    samples = [make(row) for row in rows]
    assert sum(batch["input_ids"].numel() for batch in make_batches(samples)) == sum(map(len, rows))
    place = data.draw(st.integers(0, len(samples)))
    number = data.draw(st.sampled_from([7, torch.tensor(7), np.int64(7), {"input_ids": 7}, {"input_ids": np.array(7)}]))
    with pytest.raises(CalibrationError, match=f"sample {place} is one number"):
        make_batches([*samples[:place], number, *samples[place:]])


@pytest.mark.parametrize("decodes", [True, False])
def test_what_is_predicted_is_masked_by_the_decoders_mask_if_there_is_a_decoder(decodes: bool) -> None:
    model = torch.nn.Module()
    model.config = SimpleNamespace(is_encoder_decoder=decodes)  # type: ignore[assignment]
    labelled = {"attention_mask": torch.tensor([[1, 1, 0]]), "labels": torch.tensor([[4, 5, -100]])}
    found = output_mask(model, labelled)
    assert found is (None if decodes else labelled["attention_mask"])
    both = {**labelled, "decoder_input_ids": torch.tensor([[4]]), "decoder_attention_mask": torch.tensor([[1]])}
    assert output_mask(model, both) is both["decoder_attention_mask"]
