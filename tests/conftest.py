import torch

# The tensors of the tests are small: more threads only wait for each other, very long on a machine that is busy.
torch.set_num_threads(1)
