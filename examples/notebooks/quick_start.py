# %% [markdown]
# # Quick start
#
# What fits this machine, what would be done, a picture, what was done. In a notebook, plans and reports are tables.

# %%
import ernie_accel

ernie_accel.recommend()

# %% [markdown]
# The same for a card that is not here:

# %%
ernie_accel.recommend(ernie_accel.Context.named("rtx3060"))

# %% [markdown]
# ## A picture
#
# Without a download: `pipe = ernie_accel.demo.load()`, and `height=128, width=128` in each call.

# %%
pipe = ernie_accel.load("baidu/ERNIE-Image-Turbo")
ernie_accel.plan(pipe, preset="auto")

# %%
ernie_accel.optimize(pipe, preset="auto")
pipe("a lighthouse at dusk").images[0]

# %%
ernie_accel.report(pipe)

# %% [markdown]
# The original, bit for bit:

# %%
ernie_accel.restore(pipe)
