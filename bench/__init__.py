"""Benchmarks of adaptc against the frozen base and PEFT: ``python -m bench <table>``.

One harness, one module per table. Results are written by the program into ``bench/results/``.
"""
