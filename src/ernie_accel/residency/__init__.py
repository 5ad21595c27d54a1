"""Run a pipe in less device memory than its weights need: what is in use is there, the rest waits on the host.

layout    where each piece of the weights lies on the device: pure arithmetic, which plans use, too
pieces    cut the weights of a pipe into pieces, and give them one place on the device and one on the host
movers    copy pieces to the device while it computes
keeper    bring each piece before it is used, and the next ones meanwhile
guard     refuse what would lose weights that are not on the device at the moment
"""
