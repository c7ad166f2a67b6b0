"""How network pickles are read without running anything, for training/nvidia_pickle.py."""
