"""How much memory a pipe needs, stage by stage, and what to do so that it fits; from shapes alone.

call          what a user will ask for: size, pictures at once, prompt length
activations   run one step on tensors without data, and count what a device would hold
stages        weights and activations of each stage of a call, and the peak
planner       choose where weights live, and in how many bits, for a budget; say why
"""
