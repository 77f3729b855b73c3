"""A transfer of more than 4 GiB."""

import numpy as np
import pytest

from pplx_jax.engine import TransferEngine


@pytest.mark.slow
@pytest.mark.parametrize("fabric", ["local", "tcp"])
def test_more_than_4_gib(fabric):
    size = 2**32 + 4097
    with TransferEngine(fabric, timeout=300) as left, TransferEngine(fabric, timeout=300) as right:
        # Pages that nobody has written are one page of zeros: the source costs no memory.
        source, target = left.empty(size), right.empty(size)
        for place in (0, 2**31, 2**32 - 1, 2**32, size - 1):
            source.array[place] = 1 + place % 250
        left.write(source, target.descriptor, imm=1).result(300)
        right.imm_counter(1).wait(1)
        marked = [0, 2**31, 2**32 - 1, 2**32, size - 1]
        np.testing.assert_array_equal(target.array[marked], source.array[marked])
        assert np.count_nonzero(target.array) == len(marked)
