"""CUDA kernels on a CPU, from the lines that nvcc compiles: see emulator.h."""
