"""A GPU that is pretended: the CPU lane, on which each tensor has a place as if there were one.

On the lane a tensor "on the GPU" is a CPU tensor like any other, so nothing shows that a factory
lacks its ``device=``, nor that the host waits for a number. Here the storage of a tensor that would
lie on the GPU is marked. Views, ``.data``, optimizers, autograd and gloo keep storages as they are,
so the mark follows the values everywhere, and the numbers of a run are the lane's. A mode that sees
every operation then does what a device would:

- an operation whose tensors lie in two places raises what torch raises, by the rules of
  ``torch._subclasses.fake_tensor``: CPU tensors without a dimension, and indices, may come along;
- new tensors lie where their ``device=``, or what they are made of, says; those of ``torch.empty``
  hold NaN, or a number that no index has;
- a collective over a device group (Megatron's default) wants tensors on the GPU, one over a group
  made with ``backend="gloo"`` tensors on the CPU;
- what makes the host wait for the device (``rules``) is counted by the line that asked;
- a CPU tensor that a copy may not have reached yet must not be read.

Not seen: work of other threads, streams that do not wait for each other, memory, kernels (Triton is
off), and waits inside Transformer Engine, Apex or NCCL.

``machine.install()`` in a process with the CPU lane; ``runner`` does where ``TESTS_PRETENDED_GPU``
is set (``ENV``), also for all runs of ``TESTS_PRETENDED_GPU=1 pytest ...``; ``reports`` prints and
reads what the host waited for.
"""

ENV = {"TESTS_PRETENDED_GPU": "1"}
"""Of a run on the pretended GPU."""
