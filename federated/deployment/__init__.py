"""Decentralized training at real institutions: NVIDIA FLARE carries the messages of `federated.exchange`."""
