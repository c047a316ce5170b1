"""
Stable-Baselines3's own tests, run against our algorithms in the place of SAC: ``python -m tests.sb3_suite --algo MTSAC``.

Nothing of them is kept here: the tests are taken from the source distribution of the installed version and cached.
"""
