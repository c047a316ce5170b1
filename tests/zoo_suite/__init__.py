"""
RL Zoo's own tests of SAC, run with our algorithms: ``python -m tests.zoo_suite --algo pacosac``.

Nothing of them is kept here: the tests are taken from the source distribution of the installed version and cached.
"""
