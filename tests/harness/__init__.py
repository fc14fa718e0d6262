"""What tests share: the CPU lane, gloo processes, stand-ins, small models and recipes."""
