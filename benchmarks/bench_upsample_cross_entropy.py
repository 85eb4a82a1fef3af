"""upsample_cross_entropy: pspnet_fast/bench/loss.py has the cases."""

from cases_of import benchmark

test_case = benchmark("upsample_cross_entropy")
