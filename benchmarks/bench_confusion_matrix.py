"""confusion_matrix: pspnet_fast/bench/ops.py has the cases."""

from cases_of import benchmark

test_case = benchmark("confusion_matrix")
