"""Tables: what goes in comes out, to the bit, and reading leaves nothing running behind."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from stages.samples import embedding_array, half_embeddings_of, table_from_bytes, table_to_bytes

TOP = Path(__file__).parents[2]
BITS = arrays.arrays(np.uint16, st.tuples(st.integers(0, 20), st.integers(1, 9)))


@given(bits=BITS, start=st.integers(0, 5))
def test_embeddings_are_kept_to_the_bit(bits: np.ndarray, start: int) -> None:
    half = bits.view(np.float16)
    table = pa.table({"key": [f"{i}" for i in range(len(half))], "image_embedding": embedding_array(half)})[start:]
    data = table_to_bytes(table)
    assert data == table_to_bytes(table)
    read = half_embeddings_of(table_from_bytes(data, ["image_embedding"]), "image_embedding")
    np.testing.assert_array_equal(read.view(np.uint16), bits[start:])
    assert table_from_bytes(data)["key"].to_pylist() == table["key"].to_pylist()


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux lists them")
def test_a_table_is_read_by_the_thread_that_asks() -> None:
    """Threads of Arrow's that outlive the reading abort a process that ends just then, one in twenty on two cores."""
    code = (
        "import os\n"
        "import numpy as np, pyarrow as pa\n"
        "from stages.samples import embedding_array, table_from_bytes, table_to_bytes\n"
        "columns = {name: embedding_array(np.ones((500, 64))) for name in 'abcd'}\n"
        "data = table_to_bytes(pa.table(columns))\n"
        "before = set(os.listdir('/proc/self/task'))\n"
        "assert table_from_bytes(data).num_rows == table_from_bytes(data, ['b']).num_rows == 500\n"
        "print(len(set(os.listdir('/proc/self/task')) - before))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=TOP, capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"
