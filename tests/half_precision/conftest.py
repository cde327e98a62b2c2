"""Skips what simulates Paddle 2.6 where another Paddle is installed."""

import pytest


@pytest.fixture(autouse=True)
def paddle_2_6(request):
    from paddlemix.utils.compat import PADDLE_3

    if PADDLE_3 and "any_paddle" not in request.keywords:
        pytest.skip("the simulator wraps paddle._C_ops, which Paddle 3 passes by; `make test-paddle26` runs it")
