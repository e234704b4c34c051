"""The records of a layer's blocks, and the flat tuples that autograd knows."""

import pytest

from fastbert_kernels.block_records import FeedForwardParameters, NormSaved, ProjectionParameters, read


def test_records_come_back_from_a_flat_tuple() -> None:
    first, second = FeedForwardParameters(*range(6)), ProjectionParameters(*range(10, 17))
    back = read((*first, *second), FeedForwardParameters, ProjectionParameters)
    assert back == [first, second]
    assert [type(record) for record in back] == [FeedForwardParameters, ProjectionParameters]
    assert (back[0].norm_bias, back[1].head_mask, back[1].value_bias) == (5, 10, 16)


@pytest.mark.parametrize("count", [8, 10])
def test_a_tuple_of_another_length_is_refused(count: int) -> None:
    with pytest.raises(ValueError, match=f"FeedForwardParameters, NormSaved have 9 fields, got {count} values"):
        read(range(count), FeedForwardParameters, NormSaved)
