"""pyramid_batch_norm: pspnet_fast/bench/ops.py has the cases."""

from cases_of import benchmark

test_case = benchmark("pyramid_batch_norm")
