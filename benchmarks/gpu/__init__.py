"""What `make gpu` runs on a machine with a GPU, stage by stage; see docs/gpu.md.

`benchmarks/gpu.sh` gives every stage its time and its process. `device` is the GPU, or a stand-in
for one, with which every stage can be rehearsed on any machine; `environment` says what there is;
`build` compiles; `problems` are the kernels with their arguments, which `checks` compares with
float64, `timing` measures one by one and `counters` runs under the hardware's counters; `profile`
lists the kernels of a training step. `items` lets a stage survive what crashes or hangs in it,
`store` writes, `digest` sums up, and `kernel_table` is the Markdown table of the kernels.
"""
