"""FusedPSPHead, and PSPNet-50 with either head: pspnet_fast/bench/head.py and network.py have the cases."""

from cases_of import benchmark

test_case = benchmark("head")
