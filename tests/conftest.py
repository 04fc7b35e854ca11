"""One thread for every test: tensors are tiny, bits are compared, and idle threads cost minutes on a busy machine."""

from __future__ import annotations

import pytest
import torch


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    if torch.get_num_threads() != 1:
        torch.set_num_threads(1)
