"""Settings that every test shares."""

import os

import pytest
import torch as th
from hypothesis import HealthCheck, settings

from sb3_mtrl.common import cpu_tuning

# The networks of the tests are tiny: more threads would only wait for each other, all the more beside other test processes.
# Nothing is seeded here: a test that depends on random numbers seeds them itself.
th.set_num_threads(1)

# `make test` tries the same few examples each time. To look for new ones:
# HYPOTHESIS_PROFILE=thorough (or --hypothesis-profile=thorough) with -m pytest tests/test_properties.py tests/test_fuzz.py
_COMMON = dict(deadline=None, suppress_health_check=list(HealthCheck))  # examples that train take as long as they take
settings.register_profile("quick", max_examples=20, derandomize=True, database=None, **_COMMON)
settings.register_profile("thorough", max_examples=500, **_COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "quick"))


@pytest.fixture(autouse=True)
def choice_of_products(monkeypatch):
    """A training that goes on decides for its process how float32 products are computed: not for the tests that follow."""
    monkeypatch.setattr(cpu_tuning, "_choice", None)
