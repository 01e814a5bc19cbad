"""Kernels of mlkit: a folder per kernel (`reference.py`, `cpu.cpp`, `triton.py`, `op.py`)."""
