"""`python -m convmae_kernels`: which implementations are there, and why not."""

from convmae_kernels.info import info

for name, text in info().items():
    print(f"{name:10} {text}")
