"""Benchmarks of the operators, modules, the model and a training step: the cases, once, and how they are measured.

`pspnet-fast bench` and `pytest benchmarks` run them. (docs/benchmarks.md)
"""
