"""FusedUpsampleConcat: pspnet_fast/bench/upsampled.py has the cases."""

from cases_of import benchmark

test_case = benchmark("upsample_concat")
