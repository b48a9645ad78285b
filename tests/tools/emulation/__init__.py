"""CUDA kernels compiled as plain C++ and run on the CPU (build.py, cuda_emulation.cpp)."""
