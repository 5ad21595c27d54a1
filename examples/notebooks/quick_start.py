# %% [markdown]
# # Quick start
#
# What suits this machine, what would be done, a picture, and what was done. In a notebook, plans and reports are
# tables.

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
# To try it without a download, write `pipe = ernie_accel.demo.load()`, and pass `height=128, width=128` in each call.

# %%
pipe = ernie_accel.load("baidu/ERNIE-Image-Turbo")
ernie_accel.plan(pipe, preset="auto")

# %%
ernie_accel.optimize(pipe, preset="auto")
pipe("a lighthouse at dusk").images[0]

# %%
ernie_accel.report(pipe)

# %% [markdown]
# The original, bit for bit. Where the originals of quantized weights were not kept, to save memory, the report says
# that this cannot be undone, and `restore` raises an error.

# %%
ernie_accel.restore(pipe)
