"""upsample_softmax_accumulate_: pspnet_fast/bench/ops.py has the cases."""

from cases_of import benchmark

test_case = benchmark("upsample_softmax_accumulate_")
