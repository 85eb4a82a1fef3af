"""fuse on a head of mmsegmentation: pspnet_fast/bench/head.py has the cases."""

from cases_of import benchmark

test_case = benchmark("fuse")
