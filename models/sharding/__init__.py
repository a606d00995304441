"""How a model's parameters and activations are sharded over a mesh of devices."""
