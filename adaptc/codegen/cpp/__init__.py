"""Kernels in C++ for ops that neither a library nor Inductor's generated code does well on a CPU."""
