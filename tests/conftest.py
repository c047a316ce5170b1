"""Settings that every test shares."""

import torch as th

# The networks of the tests are tiny: more threads would only wait for each other, all the more beside other test processes.
# Nothing is seeded here: a test that depends on random numbers seeds them itself.
th.set_num_threads(1)
