"""How much each format of each weight hurts: the divergence of the model's output, measured."""
