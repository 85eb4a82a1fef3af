"""PSPNet-50 as a whole, prediction and training step: pspnet_fast/bench/network.py has the cases."""

from cases_of import benchmark

test_case = benchmark("network")
